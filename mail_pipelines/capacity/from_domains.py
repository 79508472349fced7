"""The domains of the From addresses of campaigns, by which providers know who sends."""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts.addresses import AddressError, parse
from mail_pipelines.database.models import Campaign, CampaignVersion


def of_campaigns(connection: Connection, campaign_ids: Collection[int]) -> dict[int, str]:
    """By campaign, in A-labels; those without content, or with one that cannot be sent, are missing."""
    return _read(connection, Campaign.id.in_(campaign_ids)) if campaign_ids else {}


def in_states(connection: Connection, states: Collection[str]) -> dict[int, str]:
    """The same of all campaigns in these states."""
    return _read(connection, Campaign.state.in_(states))


def _read(connection: Connection, *conditions: sa.ColumnElement[bool]) -> dict[int, str]:
    address = CampaignVersion.source["from_address"].as_string()
    found = {}
    for campaign_id, text in connection.execute(
        sa.select(Campaign.id, address).join(CampaignVersion, CampaignVersion.id == Campaign.version_id).where(*conditions)
    ):
        try:
            found[campaign_id] = parse(text or "").domain
        except AddressError:
            continue
    return found
