"""Whether what was claimed a while ago may still be sent: what may have been decided since.

The claim has asked all this. It is asked again only for what is late: a message whose destination has taken long over the recipient, and a burst.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts import consent
from mail_pipelines.database.engine import is_mysql
from mail_pipelines.database.models import SENDING_STATES, Campaign, Contact, Server, Subscription
from mail_pipelines.database.procedures.calling import call
from mail_pipelines.delivery.recording import ClaimRef
from mail_pipelines.dispatch import holds

# A server that is draining ends what it has in hand.
_SENDING = sa.select(Campaign.brand_id, Campaign.unsubscribe, Campaign.unsubscribe_list_id).where(
    Campaign.id == sa.bindparam("campaign"),
    Campaign.state == "sending",
    sa.exists().where(Server.id == sa.bindparam("server"), Server.state.in_((*SENDING_STATES, "draining"))),
)


def claim(connection: Connection, ref: ClaimRef) -> bool:
    """Whether the campaign of a claim is sending, its server has not been stopped, and nothing of it is held."""
    return _sending(connection, ref) is not None


def message(connection: Connection, ref: ClaimRef, contact_id: int) -> bool:
    """Whether all this is so, and the recipient exists and is neither suppressed nor has left the campaign's list."""
    found = _sending(connection, ref)
    if found is None:
        return False
    if is_mysql(connection):
        [found_rows] = call(connection, "recipient_wanted", (ref.campaign_id, ref.server_id, contact_id))
        return bool(found_rows)
    scopes = consent.campaign_scopes(found.brand_id, found.unsubscribe_list_id)
    wanted = [Contact.id == contact_id, ~consent.suppressed_clause(Contact.address_hash, Contact.domain, scopes)]
    if found.unsubscribe == "list":
        left = (Subscription.contact_id == contact_id, Subscription.list_id == found.unsubscribe_list_id, Subscription.subscribed.is_(False))
        wanted.append(~sa.exists().where(*left))
    return connection.execute(sa.select(Contact.id).where(*wanted)).first() is not None


def _sending(connection: Connection, ref: ClaimRef) -> Any:
    if holds.over_claim(connection, ref.campaign_id, ref.server_id, ref.provider):
        return None
    return connection.execute(_SENDING, {"campaign": ref.campaign_id, "server": ref.server_id}).one_or_none()
