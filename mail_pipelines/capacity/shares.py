"""The rule by which a server's room for a provider is shared among campaigns, slot by slot: what was planned, and a share of the rest.

What belongs here: the rule, from plain values. What does not: when it is applied, and writing what follows (`allotments`).
"""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mail_pipelines.capacity import breakers
from mail_pipelines.capacity.fleet import Fleet, Limits, Member
from mail_pipelines.capacity.grants import Grant, Place
from mail_pipelines.delivery.breakers import provider_rules

# So much of what is left of the day of a server that is warmed up may be unspent before grants are lowered.
_SLACK = 1.1


@dataclass(frozen=True)
class Wants:
    """A campaign with rows waiting for a provider: its weight, the pools that may send it, and while its domain is on trial there the `most` of a slot, of all
    servers together (but at least one of each).
    """

    campaign_id: int
    weight: int
    pool_id: int
    overflow_pool_id: int | None
    most: int | None = None


@dataclass(frozen=True)
class Open:
    """A server as a provider's grants see it. `room` messages in a slot, `most` of a campaign; `spent`: in which slots a limit is used up already."""

    server: Member
    limits: Limits | None
    breaker: str
    room: int
    most: int
    spent: tuple[bool, ...]
    able: bool

    @property
    def warms(self) -> bool:
        """Whether what it has left of the day decides, and not its room."""
        return self.limits is not None and self.limits.warming and self.breaker == breakers.CLOSED


def open_to(fleet: Fleet, provider: str, slots: Sequence[int]) -> list[Open]:
    """The servers that may be granted something to a provider, which is not held."""
    found = []
    for server in fleet.members:
        breaker = fleet.breaker(server.id, provider)
        if breaker == breakers.OPEN:
            continue
        limits = fleet.limits(server.id, provider)
        room = 0 if limits is None else limits.per_slot
        most = room if breaker == breakers.CLOSED else provider_rules().trial_messages
        spent = tuple(fleet.spent(server.id, provider, start) for start in slots)
        found.append(Open(server, limits, breaker, room, most, spent, server.speaks and limits is not None and not spent[0]))
    return found


def signature(slots: Sequence[int], epoch: int, campaigns: Sequence[Wants], lines: Sequence[Open]) -> str:
    """What a provider's grants follow from, but for those of servers that are warmed up: as long as it is the same, they are."""
    of_lines = [(line.server, line.breaker, line.room, line.most, line.spent, line.able, line.warms) for line in lines]
    return hashlib.blake2b(repr((slots, epoch, campaigns, of_lines)).encode(), digest_size=8).hexdigest()


def shares(
    fleet: Fleet,
    slots: Sequence[int],
    campaigns_of: Mapping[str, Sequence[Wants]],
    lines_of: Mapping[str, Sequence[Open]],
    planned: Mapping[Place, int],
    planned_for: Collection[tuple[int, str]] | None,
    present: Mapping[Place, Grant],
    only_warming: Collection[str] = (),
) -> dict[Place, int]:
    """What each campaign is to be granted in these slots, the current one first, if so much is `planned` there; `present` are their grants.

    `planned_for` are the campaigns that the plan has looked at, by provider (None: those for which something is planned). To the providers of `only_warming`
    nothing is said but of servers that are warmed up.
    """
    known = {(campaign, provider) for campaign, _, provider, _ in planned} if planned_for is None else planned_for
    planned_slots = {(provider, start) for _, _, provider, start in planned}
    wanted: dict[Place, int] = {}
    for provider, lines in lines_of.items():
        campaigns = campaigns_of[provider]
        able = {line.server.pool_id for line in lines if line.able}
        theirs = {
            pool: [one for one in campaigns if one.overflow_pool_id == pool and one.pool_id not in able | {pool}]
            for pool in {line.server.pool_id for line in lines}
        }
        ours = {pool: [one for one in campaigns if one.pool_id == pool] for pool in theirs}
        for line in lines:
            if provider in only_warming and not line.warms:
                continue
            server, pool = line.server.id, line.server.pool_id
            both = ours[pool] + theirs[pool]
            total = sum(one.weight for one in both)
            for start, spent in zip(slots, line.spent, strict=True):
                # Whether a later slot needs the overflow pools will be seen when it comes.
                mine = both if start == slots[0] else ours[pool]
                if spent:
                    # No claim gets anything, so sessions would be started in vain.
                    wanted |= {place: present[place].used for one in mine if (place := (one.campaign_id, server, provider, start)) in present}
                elif line.warms:
                    weights = {(one.campaign_id, server, provider, start): one.weight for one in mine}
                    wanted |= _of_the_day(weights, fleet.left(server, provider, start), planned, present)
                else:
                    left = max(0, line.room - sum(planned.get((one.campaign_id, server, provider, start), 0) for one in both)) if planned else line.room
                    strangers = (provider, start) in planned_slots
                    for one in mine:
                        place = one.campaign_id, server, provider, start
                        share = planned.get(place, 0) + left * one.weight // total
                        if strangers and (one.campaign_id, provider) not in known:
                            share = max(share, line.room * one.weight // total)
                        wanted[place] = min(max(1, share), line.most) if line.room else 0
    return wanted | _on_trial(wanted, campaigns_of, lines_of)


def _on_trial(wanted: Mapping[Place, int], campaigns_of: Mapping[str, Sequence[Wants]], lines_of: Mapping[str, Sequence[Open]]) -> dict[Place, int]:
    """What is left of the grants of campaigns whose domain is on trial: an equal part of the messages of the trial for each server that is able."""
    able = {provider: sum(line.able for line in lines) or 1 for provider, lines in lines_of.items()}
    most = {
        (one.campaign_id, provider): max(1, one.most // able[provider])
        for provider, campaigns in campaigns_of.items()
        for one in campaigns
        if one.most is not None and provider in able
    }
    return {place: min(granted, most[place[0], place[2]]) for place, granted in wanted.items() if (place[0], place[2]) in most} if most else {}


def _of_the_day(weights: Mapping[Place, int], left: int, planned: Mapping[Place, int], present: Mapping[Place, Grant]) -> dict[Place, int]:
    """What campaigns are to be granted of what a server that is warmed up has `left`: together no more than that beside what they have used.

    If it is less than a message for each, the most urgent have it.
    """
    weights = dict(sorted(weights.items(), key=lambda item: -item[1]))
    used = {place: present[place].used if place in present else 0 for place in weights}
    wanted = dict(used)
    for place in weights:
        mine = min(left, max(0, planned.get(place, 0) - used[place]))
        wanted[place] += mine
        left -= mine
    spare, total = left, sum(weights.values())
    for place, weight in weights.items():
        share = min(left, -(-spare * weight // total))
        wanted[place] += share
        left -= share
    return wanted


def lowered(fleet: Fleet, wanted: Mapping[Place, int], present: Mapping[Place, Grant]) -> dict[Place, int]:
    """The grants that are too high: where a limit is used up; and where servers are warmed up, if together by so much that it matters, for they are written
    while claims wait for them.
    """
    spent = functools.cache(fleet.spent)
    warms = functools.cache(lambda server, provider: fleet.warms(server, provider) and fleet.breaker(server, provider) == breakers.CLOSED)
    places_of: defaultdict[tuple[int, str, int], list[Place]] = defaultdict(list)
    found: dict[Place, int] = {}
    for place, granted in wanted.items():
        if place not in present:
            continue
        _, server, provider, start = place
        if spent(server, provider, start):
            if present[place].granted > granted:
                found[place] = granted
        elif warms(server, provider):
            places_of[server, provider, start].append(place)
    for (server, provider, start), places in places_of.items():
        unspent = sum(max(wanted[place], present[place].granted) - present[place].used for place in places)
        if unspent > _SLACK * fleet.left(server, provider, start):
            found |= {place: wanted[place] for place in places if wanted[place] < present[place].granted}
    return found
