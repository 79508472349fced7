"""What providers told of us last, as far as it bears on sending: of a server for its warm-up, and of everything for alerts.

What belongs here: which readings are about which server. What does not: the limits (`warm_up.toml`), and what a day means (`warm_up_rules`).
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Collection, Iterable

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.capacity import from_domains
from mail_pipelines.capacity.warm_up_days import DAY, Pair, campaigns_of, day_of
from mail_pipelines.capacity.warm_up_rules import Rules, Told, rules
from mail_pipelines.database.models import CampaignMinute
from mail_pipelines.dispatch import servers
from mail_pipelines.reputation import readings
from mail_pipelines.reputation.readings import GOOGLE, Reading


def about_servers(connection: Connection, day: int, server_ids: Collection[int], known: Rules) -> dict[Pair, list[Told]]:
    """What had been told by the end of a day about the mail of these servers to a provider, by each signal the worst."""
    found = readings.read(connection, day - (known.told_days - 1) * DAY, day)
    if not found:
        return {}
    subjects = _addresses(connection, server_ids)
    sent = {provider: _domains(connection, day, server_ids, provider) for provider in {signal.provider for signal in known.told if signal.by == GOOGLE}}
    result: defaultdict[Pair, list[Told]] = defaultdict(list)
    for signal in known.told:
        newest = {subject: reading for (by, subject), reading in readings.newest(found, signal.of).items() if by == signal.by}
        theirs = sent[signal.provider] if signal.by == GOOGLE else subjects
        for server_id in server_ids:
            mine = [Told(signal, newest[subject]) for subject in theirs.get(server_id, ()) if subject in newest]
            if mine:
                result[server_id, signal.provider].append(max(mine, key=lambda told: told.value))
    return dict(result)


def bad(connection: Connection, now: dt.datetime) -> list[Told]:
    """What providers told last of any domain or address of ours that a warm-up would step back for."""
    known = rules()
    return [one for one in _newest(readings.read(connection, day_of(now) - known.told_days * DAY), known) if one.reaches("back")]


def _newest(found: Collection[Reading], known: Rules) -> Iterable[Told]:
    for signal in known.told:
        for (by, _), reading in readings.newest(found, signal.of).items():
            if by == signal.by:
                yield Told(signal, reading)


def _addresses(connection: Connection, server_ids: Collection[int]) -> dict[int, Collection[str]]:
    """The addresses that these servers send from, by server: those that they tell, and the one by which the centre knows them."""
    fleet = servers.all_servers(connection)
    return {server.id: {*(server.health or {}).get("addresses", ()), server.host} for server in fleet if server.id in server_ids}


def _domains(connection: Connection, day: int, server_ids: Collection[int], provider: str) -> dict[int, set[str]]:
    """The domains of From addresses whose mail these servers sent to a provider on a day, by server."""
    pairs = (
        sa.select(CampaignMinute.server_id, CampaignMinute.campaign_id)
        .where(
            CampaignMinute.campaign_id.in_(campaigns_of(connection, day, since=day)),
            CampaignMinute.minute >= day // 60,
            CampaignMinute.minute < (day + DAY) // 60,
            CampaignMinute.server_id.in_(server_ids),
            CampaignMinute.provider == provider,
        )
        .distinct()
    )
    campaigns: defaultdict[int, set[int]] = defaultdict(set)
    for server_id, campaign_id in connection.execute(pairs).tuples():
        campaigns[server_id].add(campaign_id)
    domains = from_domains.of_campaigns(connection, set().union(*campaigns.values()))
    return {server_id: {domains[number] for number in numbers if number in domains} for server_id, numbers in campaigns.items()}
