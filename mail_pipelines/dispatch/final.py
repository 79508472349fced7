"""Which shards are final, by the counters: their audience is frozen and none of their rows is open."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.models import Campaign, CampaignCounter, State

# A tick reports no more shards than this; the rest waits for the next.
SHARDS_A_TICK = 256
_RECENT = dt.timedelta(days=30)
_FROZEN = ("sending", "paused", "finished", "cancelled")


@dataclass(frozen=True)
class FinalShard:
    """A shard without open rows: how many rows it has and how many ended in which state."""

    campaign: str
    shard: int
    rows: int
    states: Mapping[str, int]


def recent_campaigns(connection: Connection, now: dt.datetime) -> dict[str, int]:
    """Frozen campaigns that may still have something to report: key → id."""
    rows = connection.execute(
        sa.select(Campaign.key, Campaign.id).where(
            Campaign.state.in_(_FROZEN), Campaign.audience_manifest.is_not(None), sa.func.coalesce(Campaign.finished_at, now) > now - _RECENT
        )
    )
    return {row.key: row.id for row in rows}


def final_shards(connection: Connection, campaigns: Mapping[str, int], shards: int, reported: Mapping[str, Collection[int]]) -> list[FinalShard]:
    """Final shards of `campaigns` (key → id) that are not in `reported`, at most `SHARDS_A_TICK`. Each campaign has `shards`, used or not."""
    found: list[FinalShard] = []
    for key, campaign_id in campaigns.items():
        known = set(reported.get(key, ()))
        counts: defaultdict[int, dict[State, int]] = defaultdict(dict)
        for row in connection.execute(
            sa.select(CampaignCounter.shard, CampaignCounter.state, sa.func.sum(CampaignCounter.count).label("rows"))
            .where(CampaignCounter.campaign_id == campaign_id)
            .group_by(CampaignCounter.shard, CampaignCounter.state)
        ):
            counts[row.shard][State(row.state)] = int(row.rows)
        for shard in range(shards):
            states = counts[shard]
            if shard in known or any(count for state, count in states.items() if not state.is_final):
                continue
            ended = {state.name.lower(): count for state, count in sorted(states.items()) if count}
            found.append(FinalShard(key, shard, sum(ended.values()), ended))
            if len(found) == SHARDS_A_TICK:
                return found
    return found
