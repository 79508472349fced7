"""How large campaigns are expected to be that have no audience yet: as the last one to the same segments was, or else as many as these match.

What belongs here: both guesses, and remembering the second, for which contacts are counted once a day. What does not: who of them may be mailed, which only the
freeze finds out.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.capacity.horizon import DAYS
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Campaign, CampaignCounter, State, SyncState
from mail_pipelines.database.upsert import put
from mail_pipelines.errors import MailPipelinesError

# The states of campaigns that are still to begin.
COMING = ("scheduled", "building")
# A count is good for so long, while the campaign names the same segments.
_COUNTED_FOR = dt.timedelta(days=1)
# Campaigns back in time among which one to the same segments is looked for.
_LOOKED_AT = 200
_SOURCE = "campaign_sizes"


def expected(connection: Connection, campaign_ids: Iterable[int]) -> dict[int, dict[str, int]]:
    """By campaign its messages for each provider; missing where nobody knows."""
    wanted = _segments(connection, Campaign.id.in_(list(campaign_ids)))
    found = _as_before(connection, wanted)
    for key, value, _ in _counted(connection):
        if key in wanted and key not in found and value["segments"] == wanted[key] and value["providers"]:
            found[key] = dict(value["providers"])
    return found


def count(engine: Engine, settings: Settings, now: dt.datetime | None = None) -> list[str]:
    """Count whom the segments match of campaigns that begin within the days of the far plan and are like none before, unless that was done within a day; what
    could not be counted, in words. `now` is the database's time if not given.
    """
    from mail_pipelines.campaigns import members

    with reading(engine) as connection:
        now = now or database_now(connection)
        coming = _segments(connection, Campaign.state.in_(COMING), Campaign.start_at <= now + dt.timedelta(days=DAYS))
        known = _as_before(connection, coming)
        counted = _counted(connection)
    fresh = {key for key, value, at in counted if coming.get(key) == value["segments"] and now - at < _COUNTED_FOR}
    gone = [str(key) for key, _, _ in counted if key not in coming]
    failed, rows = [], []
    for key, segments in coming.items():
        if key in known or key in fresh:
            continue
        try:
            providers = members.count(engine, settings, segments["include"], segments["exclude"], now)
        except MailPipelinesError as error:
            failed.append(str(error))
            continue
        value = {"segments": segments, "providers": providers}
        rows.append({"source": _SOURCE, "key": str(key), "value": value, "version": 1, "changed_at": now})

    def keep(connection: Connection) -> None:
        connection.execute(sa.delete(SyncState).where(SyncState.source == _SOURCE, SyncState.key.in_(gone)))
        put(connection, SyncState, rows)

    if rows or gone:
        transact(engine, keep)
    return sorted(set(failed))


def _segments(connection: Connection, *conditions: sa.ColumnElement[bool]) -> dict[int, Mapping[str, Any]]:
    return {row.id: row.segments for row in connection.execute(sa.select(Campaign.id, Campaign.segments).where(*conditions).order_by(Campaign.id))}


def _counted(connection: Connection) -> list[tuple[int, Mapping[str, Any], dt.datetime]]:
    """What was counted: campaign, its segments and the contacts by provider, and when."""
    rows = connection.execute(sa.select(SyncState.key, SyncState.value, SyncState.changed_at).where(SyncState.source == _SOURCE))
    return [(int(row.key), row.value, row.changed_at) for row in rows]


def _as_before(connection: Connection, wanted: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, int]]:
    """By campaign the messages for each provider that the last campaign to the same segments had; missing where there was none."""
    if not wanted:
        return {}
    frozen = connection.execute(
        sa.select(Campaign.id, Campaign.segments)
        .where(Campaign.audience_counts.is_not(None), Campaign.id.not_in(list(wanted)))
        .order_by(Campaign.id.desc())
        .limit(_LOOKED_AT)
    ).all()
    models = {campaign_id: next((row.id for row in frozen if row.segments == segments), None) for campaign_id, segments in wanted.items()}
    mixes: defaultdict[int, dict[str, int]] = defaultdict(dict)
    known = [model for model in models.values() if model is not None]
    by = (CampaignCounter.campaign_id, CampaignCounter.provider)
    sent = CampaignCounter.state != int(State.SUPPRESSED)
    query = sa.select(*by, sa.func.sum(CampaignCounter.count)).where(CampaignCounter.campaign_id.in_(known), sent).group_by(*by)
    for campaign_id, provider, messages in connection.execute(query) if known else ():
        if messages > 0:
            mixes[campaign_id][provider] = int(messages)
    return {campaign_id: mixes[model] for campaign_id, model in models.items() if model is not None and mixes.get(model)}
