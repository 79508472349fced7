"""Servers that are taken out of service by themselves: because providers refuse them and not their peers, because a block list that matters has them, or
because they were lost.

What belongs here: counting answers by the hour, keeping what was decided, and draining. What does not: the decision (`health_rules`), asking block lists
(`provisioning.listing`), and the server in the place of one that is gone (`shortage`).

What is kept is in `sync_state`: the sums of the last hours in one row, and a row for each server of which something was decided.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.capacity import allotments, breakers, health_rules
from mail_pipelines.capacity.health_rules import Heard, Record, Rules, Seen, Standing, decide, rules
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Campaign, CampaignMinute, State, SyncState
from mail_pipelines.database.upsert import put
from mail_pipelines.dispatch import registry, servers
from mail_pipelines.dispatch.registry import ServerState
from mail_pipelines.dispatch.servers import ServerInfo
from mail_pipelines.provisioning import listing
from mail_pipelines.provisioning.listing import Listing

LOOK_EVERY = dt.timedelta(minutes=5)
_HOUR = 60
_RECORDS = "server_health"
_SUMS = (SyncState.source == "capacity", SyncState.key == "health")
_ANSWERS = (State.DELIVERED, State.BOUNCED, State.DEFERRED)
# Their outcomes may still come in.
_LIVE = ("sending", "paused", "cancelled", "finished")
_OUT = (ServerState.DRAINING, ServerState.LOST, ServerState.PAUSED)
Pair = tuple[int, str]


@dataclass(frozen=True)
class Sums:
    """Answers by hour (its first epoch minute), server and provider: (all, bad), counted up to the minute `until`; and what is wrong with the whole fleet."""

    version: int
    until: int
    hours: Mapping[int, Mapping[Pair, tuple[int, int]]]
    trouble: str = ""


def records(connection: Connection) -> dict[str, Record]:
    """What was decided of servers, by their key."""
    rows = connection.execute(sa.select(SyncState.key, SyncState.value).where(SyncState.source == _RECORDS))
    return {key: _record(value) for key, value in rows}


def trouble(connection: Connection) -> str:
    """What is wrong with the whole fleet; "" if nothing is."""
    sums = _sums(connection)
    return "" if sums is None else sums.trouble


def look(engine: Engine, now: dt.datetime | None = None) -> list[str]:
    """Count what came since the last look, if that is five minutes ago, and drain a server that is sick; returns what was done, in words.

    `now` is the database's time if not given. Safe to repeat, and to run in several places at once: one of them decides.
    """
    rule = rules()
    with reading(engine) as connection:
        moment = now or database_now(connection)
        before = _sums(connection)
        minute = int(moment.timestamp()) // 60
        if before is not None and minute - before.until < LOOK_EVERY.total_seconds() // 60:
            return []
        hours = _counted(connection, before, minute, rule)
        known = records(connection)
        fleet = servers.all_servers(connection)
        seen = _seen(fleet, known, hours, breakers.all_breakers(connection), listing.listings(connection))
    outcome = decide(seen, known, moment, rule)
    ids = {server.key: server.id for server in fleet}

    def work(connection: Connection) -> bool:
        if not _keep(connection, before, Sums(0 if before is None else before.version, minute, hours, outcome.trouble), moment):
            return False
        for key in outcome.drain:
            registry.move(connection, key, "drain")
            allotments.take_back(connection, ids[key])
        gone = [key for key in known if key not in outcome.records]
        connection.execute(sa.delete(SyncState).where(SyncState.source == _RECORDS, SyncState.key.in_(gone)))
        changed = {key: record for key, record in sorted(outcome.records.items()) if known.get(key) != record}
        put(connection, SyncState, [_row(_RECORDS, key, _document(record), 1, moment) for key, record in changed.items()])
        return True

    if not transact(engine, work):
        return []
    said = [f"server {key} is drained: {outcome.records[key].why}" for key in outcome.drain]
    return [*said, outcome.trouble] if outcome.trouble else said


def _counted(connection: Connection, before: Sums | None, minute: int, rule: Rules) -> dict[int, dict[Pair, tuple[int, int]]]:
    """The sums of the hours that count, with the minutes that are over since the last look."""
    first = minute // _HOUR * _HOUR - rule.hours * _HOUR
    hours = {hour: dict(sums) for hour, sums in (before.hours if before is not None else {}).items() if hour >= first}
    start = max(first, before.until if before is not None else first)
    for hour in range(start // _HOUR * _HOUR, minute, _HOUR):
        sums = hours.setdefault(hour, {})
        for pair, (answers, bad) in _answers(connection, max(start, hour), min(minute, hour + _HOUR), rule).items():
            known = sums.get(pair, (0, 0))
            sums[pair] = known[0] + answers, known[1] + bad
    return hours


def _answers(connection: Connection, first: int, end: int, rule: Rules) -> Mapping[Pair, tuple[int, int]]:
    """The answers of the minutes from `first` on, before `end`."""
    since = dt.datetime.fromtimestamp(first * 60, dt.UTC)
    live = connection.execute(sa.select(Campaign.id).where(Campaign.state.in_(_LIVE), sa.func.coalesce(Campaign.finished_at, since) >= since)).scalars().all()
    by = (CampaignMinute.server_id, CampaignMinute.provider, CampaignMinute.state, CampaignMinute.reason)
    query = (
        sa.select(*by, sa.func.sum(CampaignMinute.count))
        .where(
            CampaignMinute.campaign_id.in_(live),
            CampaignMinute.minute >= first,
            CampaignMinute.minute < end,
            CampaignMinute.server_id != 0,
            CampaignMinute.state.in_([int(state) for state in _ANSWERS]),
        )
        .group_by(*by)
    )
    found: defaultdict[Pair, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for server_id, provider, state, reason, count in connection.execute(query) if live else ():
        deferred = state == int(State.DEFERRED) and reason not in rule.ignored
        bad = deferred or (state == int(State.BOUNCED) and reason in rule.refused)
        answers, so_far = found[server_id, provider]
        found[server_id, provider] = answers + int(count), so_far + (int(count) if bad else 0)
    return found


def _seen(
    fleet: Sequence[ServerInfo],
    known: Mapping[str, Record],
    hours: Mapping[int, Mapping[Pair, tuple[int, int]]],
    stops: Iterable[breakers.Breaker],
    listings: Mapping[str, Listing],
) -> list[Seen]:
    """All servers as the rule sees them: those that were taken back by what came since."""
    stopped = {(one.server_id, one.provider): one for one in stops if one.state != breakers.CLOSED}
    found = []
    for server in fleet:
        # What it was drained for does not count a second time.
        since = known[server.key].since if server.key in known else None
        heard: dict[str, Heard] = {}
        for hour, sums in hours.items():
            if since is None or hour * 60 >= since.timestamp():
                for (server_id, provider), (answers, bad) in sums.items():
                    if server_id == server.id:
                        one = heard.get(provider, Heard(0, 0))
                        heard[provider] = Heard(one.answers + max(0, answers), one.bad + max(0, bad))
        for (server_id, provider), stop in stopped.items():
            # Of one that was taken back a trial says nothing yet: it begins when an operator wants it to.
            again = stop.state == breakers.OPEN and since is not None and stop.changed_at is not None and stop.changed_at > since
            if server_id == server.id and (since is None or again):
                one = heard.get(provider, Heard(0, 0))
                heard[provider] = Heard(one.answers, one.bad, stopped=True)
        listed = listings.get(server.key)
        is_new = listed is not None and listed.confirmed and (since is None or (listed.since is not None and listed.since > since))
        words = "; ".join(listed.matters) if listed is not None and is_new else ""
        lost, retired = server.state == ServerState.LOST, server.state == ServerState.RETIRED
        found.append(Seen(server.key, server.pool_id, server.sends, lost, retired, heard, words))
    return found


def drained(connection: Connection, states: Collection[ServerState] = _OUT) -> dict[str, Record]:
    """Servers that were drained by themselves, or lost, and are still out of service: not those that an operator has taken back since the last look."""
    out = {server.key for server in servers.all_servers(connection) if server.state in states}
    return {key: record for key, record in health_rules.drained(records(connection)).items() if key in out}


def gone(connection: Connection, now: dt.datetime) -> list[str]:
    """Those of them that were so long ago that nobody will take them back; one that an operator has paused is kept."""
    return health_rules.gone(drained(connection, (ServerState.DRAINING, ServerState.LOST)), now)


# --- rows ---------------------------------------------------------------------------------------------------------


def _sums(connection: Connection) -> Sums | None:
    row = connection.execute(sa.select(SyncState.version, SyncState.value).where(*_SUMS)).one_or_none()
    if row is None:
        return None
    hours = {int(hour): {(server, provider): (answers, bad) for server, provider, answers, bad in sums} for hour, sums in row.value["hours"].items()}
    return Sums(row.version, row.value["until"], hours, row.value["trouble"])


def _keep(connection: Connection, before: Sums | None, after: Sums, now: dt.datetime) -> bool:
    """False if somebody else has looked meanwhile."""
    hours = {str(hour): [[*pair, *counts] for pair, counts in sorted(sums.items())] for hour, sums in after.hours.items()}
    value = {"until": after.until, "hours": hours, "trouble": after.trouble}
    if before is None:
        if connection.execute(sa.select(SyncState.version).where(*_SUMS).with_for_update()).first() is not None:
            return False
        connection.execute(sa.insert(SyncState).values(**_row("capacity", "health", value, 1, now)))
        return True
    swap = sa.update(SyncState).where(*_SUMS, SyncState.version == before.version)
    return connection.execute(swap.values(value=value, version=before.version + 1, changed_at=now)).rowcount == 1


def _row(source: str, key: str, value: Any, version: int, now: dt.datetime) -> dict[str, Any]:
    return {"source": source, "key": key, "value": value, "version": version, "changed_at": now}


def _document(record: Record) -> dict[str, Any]:
    since = None if record.since is None else record.since.isoformat()
    return {"standing": record.standing.value, "at": record.at.isoformat(), "why": record.why, "since": since}


def _record(value: Mapping[str, Any]) -> Record:
    since = value["since"]
    return Record(
        Standing(value["standing"]), dt.datetime.fromisoformat(value["at"]), value["why"], None if since is None else dt.datetime.fromisoformat(since)
    )
