"""What servers cost, and whether one more may be ordered. Pure: from rows and settings to a reason, or none.

What belongs here: money and numbers. What does not: which source is chosen (`reserving`).
"""

from __future__ import annotations

import calendar
import datetime as dt
from collections.abc import Iterable

from mail_pipelines.config import ProvisioningSettings
from mail_pipelines.provisioning.store import Provision

_HOUR = dt.timedelta(hours=1)
HOURS_PER_MONTH = 730


def month_of(now: dt.datetime) -> tuple[dt.datetime, dt.datetime]:
    """The calendar month (UTC) of a moment: its beginning and its end."""
    begin = now.astimezone(dt.UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return begin, begin + dt.timedelta(days=calendar.monthrange(begin.year, begin.month)[1])


def cost_this_month(provisions: Iterable[Provision], now: dt.datetime) -> float:
    """What servers made here cost in this calendar month: those that run as if they stayed until its end."""
    begin, end = month_of(now)
    cost = 0.0
    for provision in provisions:
        if provision.ordered_at is not None:
            until = provision.ended_at or end
            hours = (min(until, end) - max(provision.ordered_at, begin)) / _HOUR
            cost += max(hours, 0.0) * (provision.cost_per_hour or 0.0)
    return cost


def cost_of_one_more(cost_per_hour: float, now: dt.datetime) -> float:
    """What a server that is ordered now costs until the end of this month."""
    return (month_of(now)[1] - now) / _HOUR * cost_per_hour


def too_dear(provisions: Iterable[Provision], cost_per_hour: float, settings: ProvisioningSettings, now: dt.datetime) -> str:
    """Why the budget does not allow one more server of that cost; "" if it does, or the server costs nothing."""
    spent, more = cost_this_month(provisions, now), cost_of_one_more(cost_per_hour, now)
    if not more or spent + more <= settings.budget:
        return ""
    return f"one more would cost {more:.2f} until the end of the month, with {spent:.2f} for those there are: above provisioning.budget, {settings.budget:.2f}"


def allowed(provisions: Iterable[Provision], cost_per_hour: float, settings: ProvisioningSettings, now: dt.datetime) -> int:
    """How many more may be asked for, by number and money; those that are asked for and not ordered yet count as if they were ordered now."""
    known = list(provisions)
    living = [one for one in known if one.ended_at is None]
    number = max(0, settings.most - len(living))
    if not (each := cost_of_one_more(cost_per_hour, now)):
        return number
    promised = sum(one.ordered_at is None for one in living) * each
    return max(0, min(number, int((settings.budget - cost_this_month(known, now) - promised) / each)))


def may_be_given_back_at(provision: Provision, settings: ProvisioningSettings) -> dt.datetime | None:
    """When a server has reached its shortest lifetime; None if it has no host yet."""
    return None if provision.created_at is None else provision.created_at + dt.timedelta(hours=settings.minimum_hours)
