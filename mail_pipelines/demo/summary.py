"""What the demo says at its end: the ledger's totals, and what the catchers hold, which is the proof."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.campaigns import progress, store
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Claim, Contact, Delivery, State
from mail_pipelines.dispatch.catcher.store import Kept, kept
from mail_pipelines.messages.tokens import read_delivery


@dataclass(frozen=True)
class Summary:
    """`duplicates` (messages beyond the first to a contact) and `lost` (delivered in the ledger, nowhere at the catchers) are
    counted from what the catchers keep. `servers` has the messages of each; `overlap` is the share of the time in which any
    server had recipients in hand that all had, by their claims; `send_seconds` lies between the first and the last message.
    """

    contacts: int
    matched: int
    excluded: int
    audience: int
    delivered: int
    bounced: int
    deferred: int
    pending: int
    suppressed: int
    expired: int
    cancelled: int
    unknown: int
    duplicates: int
    lost: int
    servers: Mapping[str, int]
    overlap: float
    send_seconds: float

    @property
    def is_right(self) -> bool:
        return not self.duplicates and not self.lost

    def to_document(self) -> dict[str, Any]:
        return asdict(self)


def summarise(engine: Engine, settings: Settings, key: str) -> Summary:
    """Compare the ledger of a campaign with the messages at the far end."""
    with reading(engine) as connection:
        campaign = store.load(connection, key)
        contacts = connection.execute(sa.select(sa.func.count()).select_from(Contact)).scalar_one()
        totals = progress.totals(connection, campaign).check()
        delivered = set(
            connection.execute(sa.select(Delivery.contact_id).where(Delivery.campaign_id == campaign.id, Delivery.state == int(State.DELIVERED))).scalars()
        )
        opened = sa.select(Claim.server_id, Claim.opened_at, Claim.closed_at).where(Claim.campaign_id == campaign.id, Claim.size > 0, Claim.state == "closed")
        spans = [(row.server_id, row.opened_at.timestamp(), row.closed_at.timestamp()) for row in connection.execute(opened)]
    messages = [message for message in kept(Path(settings.server.mail_folder)) if _campaign(message, settings) == campaign.id]
    copies = Counter(read_delivery(message.token, settings.token_key()).contact_id for message in messages)
    counts = campaign.audience_counts or {}
    parts = totals.parts()
    unresolved = parts.pop("unresolved")
    return Summary(
        contacts=contacts,
        matched=counts["matched"],
        excluded=sum(counts["excluded"].values()),
        audience=totals.audience,
        **parts | {"unknown": parts["unknown"] + unresolved},
        duplicates=sum(count - 1 for count in copies.values()),
        lost=len(delivered - copies.keys()),
        servers=dict(Counter(server_of(message) for message in messages)),
        overlap=round(overlap(spans), 3),
        send_seconds=round(max(message.at for message in messages) - min(message.at for message in messages), 1) if messages else 0.0,
    )


def server_of(message: Kept) -> str:
    return Path(message.file).parent.name


def overlap(spans: Iterable[tuple[int, float, float]]) -> float:
    """Of the time in which any of several servers was sending, the share in which all were; `spans` are (server, begin, end) in seconds."""
    changes = sorted(change for server, begin, end in spans for change in ((begin, server, 1), (end, server, -1)))
    working: Counter[int] = Counter()
    servers = {server for _, server, _ in changes}
    some = every = last = 0.0
    for moment, server, change in changes:
        active = sum(count > 0 for count in working.values())
        some += (moment - last) * (active > 0)
        every += (moment - last) * (active == len(servers) > 1)
        working[server] += change
        last = moment
    return every / some if some else 0.0


def _campaign(message: Kept, settings: Settings) -> int:
    return read_delivery(message.token, settings.token_key()).campaign_id
