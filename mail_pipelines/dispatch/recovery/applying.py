"""What the servers' logs say, taken over by the ledger: rows that it calls unsent, though a server has offered them, get the end of that offer.

What belongs here: which of several offers counts, and the set-based change of rows, counters, limits and suppressions. Doing it again
changes nothing.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns.open_rows import WAITING, move_rows
from mail_pipelines.config import SendingSettings
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Claim, Delivery, ProviderUsage, RecoveredOffer, State
from mail_pipelines.database.upsert import add_to
from mail_pipelines.delivery import resolving
from mail_pipelines.delivery.recording import Result, windows_at
from mail_pipelines.dispatch.journal import Kind, Outcome
from mail_pipelines.dispatch.recovery import standing
from mail_pipelines.dispatch.settlement import result_of
from mail_pipelines.messages.tokens import DeliveryToken

# So many recipients are looked at in one transaction.
CHUNK = 2_000
_HOUR = 3600
_SAYS_MORE = {kind: rank for rank, kind in enumerate((Kind.DEFERRED, Kind.UNKNOWN, Kind.BOUNCED, Kind.DELIVERED))}
_SOURCE = resolving.Source("recovered")


def campaigns(connection: Connection) -> list[int]:
    """Ids of the campaigns that the logs have offers of, also of such as the database does not know."""
    return list(connection.execute(sa.select(RecoveredOffer.campaign_id).distinct().order_by(RecoveredOffer.campaign_id)).scalars())


def apply(engine: Engine, campaign_id: int, settings: SendingSettings, now: dt.datetime, advance: Callable[[int], None] = lambda _: None) -> Counter[State]:
    """Give the rows of a campaign the end of their newest offer; how many became what. `advance` is told of the recipients of each transaction."""
    ends: Counter[State] = Counter()
    last: int | None = None
    while contact_ids := _next(engine, campaign_id, last):
        ends += transact(engine, lambda connection, ids=contact_ids: _apply(connection, campaign_id, ids, settings, now))  # type: ignore[misc]
        advance(len(contact_ids))
        last = contact_ids[-1]
    return ends


def _next(engine: Engine, campaign_id: int, last: int | None) -> list[int]:
    query = sa.select(RecoveredOffer.contact_id).distinct().where(RecoveredOffer.campaign_id == campaign_id)
    if last is not None:
        query = query.where(RecoveredOffer.contact_id > last)
    with reading(engine) as connection:
        return list(connection.execute(query.order_by(RecoveredOffer.contact_id).limit(CHUNK)).scalars())


def _apply(connection: Connection, campaign_id: int, contact_ids: Sequence[int], settings: SendingSettings, now: dt.datetime) -> Counter[State]:
    ours = (Delivery.campaign_id == campaign_id, Delivery.contact_id.in_(contact_ids), Delivery.state.in_([*map(int, WAITING), int(State.UNKNOWN)]))
    rows = {row.contact_id: row for row in connection.execute(sa.select(Delivery.contact_id, Delivery.attempt, Delivery.state, Delivery.provider).where(*ours))}
    best: dict[int, Any] = {}
    columns = (column for column in RecoveredOffer.__table__.columns if column.name != "campaign_id")
    told = (RecoveredOffer.campaign_id == campaign_id, RecoveredOffer.contact_id.in_(sorted(rows)))
    for offer in connection.execute(sa.select(*columns).where(*told)):
        if offer.contact_id not in best or _rank(offer) > _rank(best[offer.contact_id]):
            best[offer.contact_id] = offer
    by_hour: defaultdict[tuple[int, int], list[Result]] = defaultdict(list)
    usage: Counter[tuple[int, str, int, int]] = Counter()
    current = set(windows_at(now))
    for contact_id, offer in best.items():
        row = rows[contact_id]
        if offer.attempt < row.attempt or (row.state == State.UNKNOWN and offer.attempt == row.attempt and offer.kind == Kind.UNKNOWN):
            continue
        outcome = Outcome(Kind(offer.kind), offer.code, offer.enhanced, offer.text or "")
        result = result_of(DeliveryToken(campaign_id, contact_id, offer.attempt), outcome, row.provider, settings, offer.at)
        by_hour[offer.server_id, offer.at - offer.at % _HOUR].append(result)
        for length, start in current.intersection(windows_at(dt.datetime.fromtimestamp(offer.at, dt.UTC))):
            usage[offer.server_id, row.provider, length, start] += 1
    ends: Counter[State] = Counter()
    for (server_id, hour), results in sorted(by_hour.items()):
        ends += resolving.recover(connection, campaign_id, server_id, results, _SOURCE, dt.datetime.fromtimestamp(hour, dt.UTC))
    names = ("server_id", "provider", "window_seconds", "window_start")
    add_to(connection, ProviderUsage, [dict(zip(names, place, strict=True)) | {"used": used} for place, used in sorted(usage.items())], column="used")
    return ends


def _rank(offer: Any) -> tuple[int, int]:
    """The newest offer counts, and of two of one attempt the one that says more: the other was the first copy of a message that was sent again."""
    return offer.attempt, _SAYS_MORE[offer.kind]


def doubt(engine: Engine, campaign_id: int, now: dt.datetime) -> int:
    """Make every row that still waits unknown, since a server may have offered it of which nobody has read the log; how many."""
    return move_rows(engine, campaign_id, WAITING, State.UNKNOWN, now)


def catch_up(engine: Engine, campaign_id: int, start_at: dt.datetime | None, settings: SendingSettings, now: dt.datetime) -> None:
    """The same for an audience that is frozen after a recovery: the campaign may have been under way in the database that is lost."""
    apply(engine, campaign_id, settings, now)
    with reading(engine) as connection:
        found = standing.newest(connection)
    if found is not None and found.uncovered() and start_at is not None and start_at <= found.began_at:
        doubt(engine, campaign_id, now)
    transact(engine, lambda connection: connection.execute(sa.delete(RecoveredOffer).where(RecoveredOffer.campaign_id == campaign_id)))


def open_claims(connection: Connection) -> int:
    """Claims that their servers have not settled yet."""
    return connection.execute(sa.select(sa.func.count()).select_from(Claim).where(Claim.state != "closed")).scalar_one()
