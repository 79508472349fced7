"""Dropping bookkeeping that nothing refers to any more: claims, allotments, usage windows."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Allotment, Base, Campaign, Claim, ProviderUsage

KEEP_CLAIMS = dt.timedelta(days=14)
KEEP_WINDOWS = dt.timedelta(days=3)
_CHUNK = 10_000


def prune(engine: Engine, now: dt.datetime) -> dict[str, int]:
    """Delete what is old, in chunks; returns the number of rows by table.

    A server proves by its newest claim that the database did not go back in time, so claims are kept for two weeks, and those
    of campaigns that still run for as long as they do.
    """
    past = int((now - KEEP_WINDOWS).timestamp())
    running = sa.select(Campaign.id).where(Campaign.state.in_(("sending", "paused")))
    newest = sa.select(sa.func.max(Claim.opened_at)).scalar_subquery()
    old_claims = transact(
        engine,
        lambda connection: (
            connection.execute(
                sa.select(Claim.id)
                .where(Claim.state == "closed", Claim.closed_at < now - KEEP_CLAIMS, Claim.campaign_id.not_in(running), Claim.opened_at < newest)
                .limit(_CHUNK * 20)
            )
            .scalars()
            .all()
        ),
    )
    pruned = {"claims": 0}
    for start in range(0, len(old_claims), _CHUNK):
        chunk = old_claims[start : start + _CHUNK]
        pruned["claims"] += transact(engine, lambda connection, chunk=chunk: connection.execute(sa.delete(Claim).where(Claim.id.in_(chunk))).rowcount)  # type: ignore[misc]
    pruned["allotments"] = _delete_before(engine, Allotment, Allotment.slot_start < past)
    pruned["provider_usage"] = _delete_before(engine, ProviderUsage, ProviderUsage.window_start + ProviderUsage.window_seconds < past)
    return pruned


def _delete_before(engine: Engine, table: type[Base], condition: sa.ColumnElement[bool]) -> int:
    def work(connection: Connection) -> int:
        return connection.execute(sa.delete(table).where(condition)).rowcount

    return transact(engine, work)
