"""Whether what was claimed a while ago may still be sent: what may have been decided since.

The claim has asked all this. It is asked again only for what is late: a message whose destination has taken long over the recipient, and a burst.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts import consent
from mail_pipelines.database.models import Campaign, Contact, Subscription

_SENDING = sa.select(Campaign.brand_id, Campaign.unsubscribe, Campaign.unsubscribe_list_id).where(
    Campaign.id == sa.bindparam("campaign"), Campaign.state == "sending", sa.func.coalesce(Campaign.held_reason, "") == ""
)


def campaign(connection: Connection, campaign_id: int) -> bool:
    """Whether the campaign is sending, and not held."""
    return _sending(connection, campaign_id) is not None


def message(connection: Connection, campaign_id: int, contact_id: int) -> bool:
    """Whether the campaign is sending, and its recipient exists and is neither suppressed nor has left its list."""
    found = _sending(connection, campaign_id)
    if found is None:
        return False
    scopes = consent.campaign_scopes(found.brand_id, found.unsubscribe_list_id)
    wanted = [Contact.id == contact_id, ~consent.suppressed_clause(Contact.address_hash, Contact.domain, scopes)]
    if found.unsubscribe == "list":
        left = (Subscription.contact_id == contact_id, Subscription.list_id == found.unsubscribe_list_id, Subscription.subscribed.is_(False))
        wanted.append(~sa.exists().where(*left))
    return connection.execute(sa.select(Contact.id).where(*wanted)).first() is not None


def _sending(connection: Connection, campaign_id: int) -> Any:
    return connection.execute(_SENDING, {"campaign": campaign_id}).one_or_none()
