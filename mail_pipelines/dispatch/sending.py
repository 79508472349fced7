"""A send run from its partition: whether anything may be sent, and the session that sends it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.config import Settings
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Campaign, Claim
from mail_pipelines.dispatch import holds, servers
from mail_pipelines.dispatch.due import open_rows
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.dispatch.session import Report, Session, journal_of

_PROGRESS_SECONDS = 10.0
# States in which the audience is recorded, so that a shard without open rows is final.
_FROZEN = ("sending", "paused", "finished", "cancelled", "archived")


@dataclass(frozen=True)
class Plan:
    """What a run of one shard finds before it starts.

    `may_send`: a session has something to do. `is_final`: the audience is frozen and no row of the shard is open.
    """

    campaign: str
    campaign_id: int | None
    may_send: bool
    is_final: bool
    open_rows: int
    reason: str


def plan(engine: Engine, campaign: str, shard: int) -> Plan:
    """Look at the campaign and the shard. Rows move only while the campaign is sending, whatever asks for a run."""
    with reading(engine) as connection:
        row = connection.execute(
            sa.select(Campaign.id, Campaign.state, Campaign.brand_id, Campaign.pool_id, Campaign.shards).where(Campaign.key == campaign)
        ).one_or_none()
        if row is None:
            return Plan(campaign, None, False, False, 0, "there is no such campaign")
        hold = holds.in_force(connection).over_campaign(row.id, row.brand_id, row.pool_id)
        left = open_rows(connection, row.id, shard)
        unsettled = connection.execute(sa.exists().where(Claim.campaign_id == row.id, Claim.shard == shard, Claim.state != "closed").select()).scalar_one()
    final = row.state in _FROZEN and not left
    if unsettled:
        # A session settles first what a dead one left, also where nothing may be sent any more.
        return Plan(campaign, row.id, True, final, left, "")
    if row.state != "sending":
        return Plan(campaign, row.id, False, final, left, f"the campaign is {row.state}")
    if hold is not None:
        return Plan(campaign, row.id, False, final, left, str(hold))
    if not left:
        unused = row.shards is not None and shard >= row.shards
        return Plan(campaign, row.id, False, final, left, "the shard is not used" if unused else "the shard is final")
    return Plan(campaign, row.id, True, False, left, "")


def run(engine: Engine, settings: Settings, server: servers.ServerInfo, planned: Plan, shard: int, run_id: str, progress: Callable[[Report], None]) -> Report:
    """Send the shard through the server; `progress` is called every ten seconds or so."""
    assert planned.campaign_id is not None
    last = time.monotonic()

    def now_and_then(report: Report) -> None:
        nonlocal last
        if time.monotonic() - last >= _PROGRESS_SECONDS:
            last = time.monotonic()
            progress(report)

    journal = journal_of(ServerFolders.of(settings.server, server.key), server.kind)
    return Session(engine, settings, server, planned.campaign_id, planned.campaign, shard, run_id, journal, now_and_then).run()
