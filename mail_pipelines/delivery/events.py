"""`delivery_events`: what is remembered of one message beside its ledger row. Their ids, their words, and the events `resent` and `resolved`."""

from __future__ import annotations

import re
from collections.abc import Collection
from hashlib import blake2b

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.models import DeliveryEvent

# An unknown row was offered once more: its first copy may have arrived.
RESENT = "resent"
# The destination refused the message, for now or for good, in its answer.
DEFERRED = "deferred"
BOUNCED = "bounced"
# A mail said that the message, though it was accepted, did not get there.
BOUNCE_REPORT = "bounce_report"
# So did a line of the journal that was found after its claim was settled.
LATE_REFUSAL = "late_refusal"
# An unknown row is no longer so: `reason` says by what, `text` by whom and why where somebody decided it.
RESOLVED = "resolved"
_ADDRESS = re.compile(r"[^\s<>@:;,]+@([^\s<>@:;,]+)")


def event_id(campaign_id: int, contact_id: int, attempt: int, kind: str) -> int:
    """A 63-bit digest of what an event is about, so that writing it twice adds nothing."""
    digest = blake2b(f"{campaign_id}|{contact_id}|{attempt}|{kind}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def mask_addresses(text: str) -> str:
    """The text with the local part of every address replaced: words of destinations quote the recipient."""
    return _ADDRESS.sub(r"***@\1", text)


def resent_among(connection: Connection, campaign_id: int, contact_ids: Collection[int]) -> set[int]:
    """Those of some recipients (at most a claim's) whose first copy may have arrived, so that they never end as if nothing had been sent."""
    query = sa.select(DeliveryEvent.contact_id).where(
        DeliveryEvent.campaign_id == campaign_id, DeliveryEvent.contact_id.in_(contact_ids), DeliveryEvent.kind == RESENT
    )
    return set(connection.execute(query).scalars()) if contact_ids else set()
