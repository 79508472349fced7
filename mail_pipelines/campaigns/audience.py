"""The freeze: the audience of a campaign becomes a fixed set of ledger rows, once and for all.

    scheduled → building     compare-and-swap; from here on only this campaign's recorded manifest counts
    evaluate, look again     segments on pinned snapshots, then consent and existence in the database
    write the manifest       a file known by its hash, recorded in the campaign's row by whoever comes first
    load the ledger          in chunks, from the manifest alone
    building → sending       only when the ledger has exactly the manifest's rows

Each step may be killed and the whole be run again, by another process and on newer snapshots: the recorded manifest decides.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns import exclusion, ledger, manifest, members, putting_off, states, store
from mail_pipelines.campaigns.campaign import Campaign, CampaignError
from mail_pipelines.campaigns.shards import shards_for
from mail_pipelines.campaigns.states import LATE_AFTER, Actor, CampaignState, StateError
from mail_pipelines.config import Settings
from mail_pipelines.database import models, partitions
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.dispatch.recovery import applying

# Told of every step: its name, how many rows are done and how many there are (0 if that is not known yet).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Audience:
    """What the freeze recorded. `built` tells whether this call did it; if not, `reason` says why nothing was written.

    `matched` = `audience` + the sum of `excluded` (reason → number). All are 0 for a campaign that was never frozen.
    """

    campaign: Campaign
    built: bool
    reason: str | None = None
    matched: int = 0
    audience: int = 0
    excluded: dict[str, int] = field(default_factory=dict)


def recorded(campaign: Campaign, *, built: bool = False, reason: str | None = None) -> Audience:
    counts = campaign.audience_counts or {"matched": 0, "audience": 0, "excluded": {}}
    return Audience(campaign, built, reason, counts["matched"], counts["audience"], counts["excluded"])


def build(engine: Engine, settings: Settings, key: str, now: dt.datetime, progress: Progress = lambda _step, _done, _total: None) -> Audience:
    """Freeze the audience of a campaign that is due, or go on with a freeze that was killed; returns what is recorded.

    In any other state, held, or before its start, nothing is written. Raises `ManifestError` for too little disk or a damaged
    manifest; the campaign then stays building and can be built again.
    """
    campaign = _reload(engine, key)
    if reason := _not_now(campaign, now):
        return recorded(campaign, reason=reason)
    manifest.require_space(settings)
    if campaign.state is CampaignState.SCHEDULED:
        transact(
            engine,
            lambda connection: states.move(connection, campaign.id, CampaignState.SCHEDULED, CampaignState.BUILDING, actor=Actor.CENTRE, now=now),
        )
    if campaign.audience_manifest is None:
        _choose(engine, settings, campaign, now, progress)
    partitions.extend(engine, now.date())
    built = False
    # Whoever changes the state meanwhile (cancel, or a second freeze that was faster) ends this one; what is recorded is the answer.
    with contextlib.suppress(StateError):
        _load(engine, settings, _reload(engine, key), now, progress)
        applying.catch_up(engine, campaign.id, campaign.definition.start_at, settings.sending, now)
        transact(engine, lambda connection: _open(connection, key, now))
        built = True
    campaign = _reload(engine, key)
    if campaign.audience_manifest is not None:
        manifest.remove_others(settings, campaign.id, campaign.audience_manifest)
    return recorded(campaign, built=built, reason=None if built else _not_now(campaign, now))


def _reload(engine: Engine, key: str) -> Campaign:
    with reading(engine) as connection:
        return store.load(connection, key)


def _not_now(campaign: Campaign, now: dt.datetime) -> str | None:
    """Why this campaign is not to be frozen now; None if it is."""
    if campaign.state not in (CampaignState.SCHEDULED, CampaignState.BUILDING):
        return f"it is {campaign.state}"
    if campaign.hold is not None:
        return str(campaign.hold)
    start = campaign.definition.start_at
    if campaign.state is CampaignState.SCHEDULED and (start is None or start > now):
        return f"it starts at {start.isoformat()}" if start else "it has no start"
    return None


def _choose(engine: Engine, settings: Settings, campaign: Campaign, now: dt.datetime, progress: Progress) -> None:
    """Evaluate, look again, write the manifest, and record it unless another freeze has."""
    progress("evaluate segments", 0, 0)
    found, snapshots = members.matched(engine, settings, campaign.definition, now)
    looked_at = 0

    def advance(rows: int) -> None:
        nonlocal looked_at
        looked_at += rows
        progress("check consent", looked_at, found.num_rows)

    allowed = exclusion.allowed(engine, campaign, found, advance)
    progress("write manifest", 0, allowed.members.num_rows)
    _record(engine, settings, campaign, allowed, snapshots, now)


def _record(engine: Engine, settings: Settings, campaign: Campaign, allowed: exclusion.Allowed, snapshots: dict[str, int], now: dt.datetime) -> None:
    written = manifest.write(settings, campaign.id, manifest.table(allowed.members)) | {"snapshots": snapshots}
    audience = allowed.members.num_rows
    counts = {"matched": audience + sum(allowed.excluded.values()), "audience": audience, "excluded": allowed.excluded}
    first = (
        sa.update(models.Campaign)
        .where(models.Campaign.id == campaign.id, models.Campaign.state == CampaignState.BUILDING.value, models.Campaign.audience_manifest.is_(None))
        .values(audience_manifest=written, audience_counts=counts, shards=shards_for(audience), updated_at=now)
    )
    transact(engine, lambda connection: connection.execute(first).rowcount)


def _load(engine: Engine, settings: Settings, campaign: Campaign, now: dt.datetime, progress: Progress) -> None:
    if campaign.audience_manifest is None:
        raise StateError(f"campaign {campaign.key} became {campaign.state} before its audience was recorded")
    expected = campaign.audience_manifest["rows"]
    loaded = 0

    def advance(rows: int) -> None:
        nonlocal loaded
        loaded += rows
        progress("load ledger", loaded, expected)

    windows = putting_off.write_spans(engine, campaign, now)
    with manifest.open_file(settings, campaign.key, campaign.audience_manifest) as file:
        found = ledger.load(engine, campaign.id, file, now, advance, windows)
    if found != expected:
        raise CampaignError(
            f"the ledger has {found} rows of campaign {campaign.key}, its manifest {expected}: it is not opened for sending; "
            "the ledger was changed by hand, or the database lost rows"
        )


def _open(connection: Connection, key: str, now: dt.datetime) -> None:
    campaign = store.load(connection, key, for_update=True)
    start = campaign.definition.start_at
    # Claims ask the row whether the campaign has expired.
    values: dict[str, Any] = {"expire_at": campaign.expires_at}
    if start is not None and now - start > LATE_AFTER:
        hours = (now - start).total_seconds() / 3600
        states.hold(connection, campaign.id, f"ready {hours:.1f} h after its start: check that it is still wanted, then resume it", now)
    states.move(connection, campaign.id, CampaignState.BUILDING, CampaignState.SENDING, actor=Actor.CENTRE, now=now, **values)
