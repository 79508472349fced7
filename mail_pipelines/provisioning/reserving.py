"""Choosing where a server's host comes from: the first source of the list that may be used, has a host, and is within number and budget.

All that reserve wait for each other, so that two servers never take the same host or the same money.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy.engine import Connection

from mail_pipelines.config import ProvisioningSettings
from mail_pipelines.database.engine import database_now
from mail_pipelines.provisioning import budget, store
from mail_pipelines.provisioning.interfaces import CannotBeMade, HostSource, NoHost, Parts, ProvisioningError
from mail_pipelines.provisioning.states import MAKING, Step
from mail_pipelines.provisioning.store import Provision

# A host of a list that could not be made a server is not tried again before that.
FAILED_FOR = dt.timedelta(days=1)


class Full(ProvisioningError):
    """So many are being made that this one waits."""


class Reservation(NamedTuple):
    source: HostSource
    host_id: str


def reserve(connection: Connection, parts: Parts, provision: Provision) -> Reservation:
    """Raises `Full`, or `CannotBeMade` with what is wrong with each source."""
    settings, now = parts.settings.provisioning, database_now(connection)
    others = [one for one in store.all_provisions(connection, since=budget.month_of(now)[0], lock=True) if one.id != provision.id]
    living = within_numbers(others, settings)
    if not parts.sources:
        raise CannotBeMade(f"there is no host source: name one in {settings.hosts} (docs/provisioning.md)")
    aside, reasons = store.set_aside(connection), []
    for source in parts.sources:
        if source.name in aside:
            reasons.append(f"{source.name} is set aside: {aside[source.name]}")
        elif source.most is not None and sum(one.source == source.name for one in living) >= source.most:
            reasons.append(f"{source.name} gives {source.most} at most")
        elif source.kind == "exim" and not settings.domain:
            reasons.append(f"{source.name}: its servers need names: set provisioning.domain")
        elif reason := budget.too_dear(others, source.cost_per_hour, settings, now):
            reasons.append(f"{source.name}: {reason}")
        else:
            taken = {one.host_id for one in living if one.source == source.name and one.host_id}
            try:
                return Reservation(source, source.reserve({*taken, *store.unfit_hosts(connection, source.name, now - FAILED_FOR)}))
            except NoHost as error:
                reasons.append(str(error))
    raise CannotBeMade(f"no host to be had: {'; '.join(reasons)}")


def within_numbers(others: Iterable[Provision], settings: ProvisioningSettings) -> list[Provision]:
    """Those of the other servers that have a host, if one more may be made beside them. Raises `Full` or `CannotBeMade`."""
    living = [one for one in others if one.ended_at is None and one.source is not None]
    if len(living) >= settings.most:
        raise CannotBeMade(f"there are {len(living)} servers made here, and provisioning.most is {settings.most}")
    making = [one for one in living if one.state in MAKING and one.step is not Step.RESERVE]
    if len(making) >= settings.at_once:
        raise Full(f"{len(making)} servers are being made, and provisioning.at_once is {settings.at_once}")
    return living
