"""Rows of servers that are made here, and of proposals: reading them, and each change as one guarded statement.

What belongs here: SQL. What does not: which change comes next (`states`, `steps`), and what servers claim and send (`dispatch`).
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.config import ProvisioningSettings
from mail_pipelines.database import models
from mail_pipelines.database.engine import database_now, transact
from mail_pipelines.database.upsert import put
from mail_pipelines.errors import nearest
from mail_pipelines.provisioning.interfaces import Host, ProvisioningError
from mail_pipelines.provisioning.states import FAILS, IN_SERVICE, MAKING, RETIRES, At, State, Step

_LONGEST_REASON = 1000
_LONGEST_WHY = 500
_T = models.Provision


class Changed(ProvisioningError):
    """Somebody else has moved this server meanwhile."""


@dataclass(frozen=True)
class Provision:
    """One server that is made here; columns as in `database.models.Provision`."""

    id: int
    key: str
    state: State
    step: Step
    attempt: int
    reason: str | None
    state_at: dt.datetime
    due_at: dt.datetime | None
    why: str
    proposal_id: int | None
    pool: str | None
    source: str | None
    host_id: str | None
    host: Host | None
    records: list[str] | None
    cost_per_hour: float | None
    requested_at: dt.datetime
    ordered_at: dt.datetime | None
    created_at: dt.datetime | None
    ended_at: dt.datetime | None
    server_id: int | None = None
    left_why: str | None = None

    @property
    def standing(self) -> str:
        """Where it is, and what it waits for or has failed by, in words."""
        words = f"{self.state}{f', {self.step}' if self.step else ''}"
        return f"{words}: {self.reason}" if self.reason else words

    @property
    def at(self) -> At:
        return At(self.state, self.step)


def _columns() -> list[sa.ColumnElement[Any]]:
    return [getattr(_T, name) for name in Provision.__dataclass_fields__]


def _provision(row: sa.Row[Any]) -> Provision:
    values = dict(row._mapping)
    host = values.pop("host")
    return Provision(**values | {"state": State(values["state"]), "step": Step(values["step"]), "host": Host(**host) if host else None})


def find(connection: Connection, key: str) -> Provision:
    """The provision of this server. Raises `ProvisioningError` naming the nearest."""
    row = connection.execute(sa.select(*_columns()).where(_T.key == key)).one_or_none()
    if row is None:
        known = connection.execute(sa.select(_T.key)).scalars()
        raise ProvisioningError(f"no server called {key!r} was made here; {nearest(key, known)}; others are retired by `mail-pipelines server retire`")
    return _provision(row)


def all_provisions(connection: Connection, *, since: dt.datetime | None = None, lock: bool = False) -> list[Provision]:
    """All that are not over, and those that ended after `since`, in the order of their requests. `lock`: whoever else asks so waits."""
    kept = _T.ended_at.is_(None) if since is None else sa.or_(_T.ended_at.is_(None), _T.ended_at >= since)
    query = sa.select(*_columns()).where(kept).order_by(_T.id)
    return [_provision(row) for row in connection.execute(query.with_for_update() if lock else query)]


def due(connection: Connection, now: dt.datetime) -> list[Provision]:
    """Those for whom something is to be done now."""
    query = sa.select(*_columns()).where(_T.ended_at.is_(None), _T.step != Step.NONE.value, sa.or_(_T.due_at.is_(None), _T.due_at <= now)).order_by(_T.id)
    return [_provision(row) for row in connection.execute(query)]


def making(connection: Connection) -> list[Provision]:
    """Those that are to be servers and do not serve yet."""
    return [one for one in all_provisions(connection) if one.state in MAKING]


# --- changes ----------------------------------------------------------------------------------------------------


def request(connection: Connection, settings: ProvisioningSettings, why: str, *, proposal_id: int | None = None, pool: str | None = None) -> Provision:
    """Ask for one more server: decides its name. What follows is done by `making.advance`."""
    now = database_now(connection)
    taken = [*connection.execute(sa.select(_T.key)).scalars(), *connection.execute(sa.select(models.Server.key)).scalars()]
    numbers = [int(match[1]) for key in taken if (match := re.fullmatch(rf"{re.escape(settings.prefix)}(\d+)", key))]
    key = f"{settings.prefix}{max(numbers, default=0) + 1}"
    values = {"state": State.REQUESTED.value, "step": Step.RESERVE.value, "attempt": 0, "state_at": now, "requested_at": now, "why": why[:_LONGEST_WHY]}
    connection.execute(sa.insert(_T).values(key=key, proposal_id=proposal_id, pool=pool, **values))
    return find(connection, key)


def begin(engine: Engine, provision: Provision, seconds: float) -> None:
    """Record that the step is being done; should this process die, it is due again after so long. Raises `Changed`."""

    def work(connection: Connection) -> None:
        now = database_now(connection)
        _swap(connection, provision, {"begun_at": now, "due_at": now + dt.timedelta(seconds=seconds)})

    transact(engine, work)


def move(connection: Connection, provision: Provision, to: At, **values: Any) -> None:
    """Record that the step is done, with what it has brought. Raises `Changed`."""
    now = database_now(connection)
    ended = {"ended_at": now} if to.step is Step.NONE and to.state not in IN_SERVICE else {}
    since = {"state_at": now} if to.state is not provision.state else {}
    moved = {"state": to.state.value, "step": to.step.value, "attempt": 0, "due_at": None, "begun_at": None, "records": None}
    # Of a failed server the reason stays; of the others that of the step before is over.
    reason = {} if to.state is State.FAILED else {"reason": None}
    _swap(connection, provision, {**moved, **reason, **since, **ended, **values})


def wait(engine: Engine, provision: Provision, seconds: float, reason: str, *, failed: bool, records: list[str] | None = None) -> None:
    """Let the step be done again after so long; `failed` counts as an attempt. Raises `Changed`."""

    def work(connection: Connection) -> None:
        until = database_now(connection) + dt.timedelta(seconds=seconds)
        kept = {} if provision.state is State.FAILED else {"reason": reason[:_LONGEST_REASON]}
        _swap(connection, provision, {"due_at": until, "begun_at": None, "attempt": min(provision.attempt + failed, 99), "records": records, **kept})

    transact(engine, work)


def fail(connection: Connection, provision: Provision, reason: str) -> None:
    """End the making of a server: what there is of it is to be removed. Raises `Changed`."""
    move(connection, provision, FAILS, reason=reason[:_LONGEST_REASON])


def _swap(connection: Connection, provision: Provision, values: Mapping[str, Any]) -> None:
    here = (_T.id == provision.id, _T.state == provision.state.value, _T.step == provision.step.value)
    if connection.execute(sa.update(_T).where(*here).values(**values)).rowcount != 1:
        raise Changed(f"server {provision.key} has been moved on by somebody else")


def give_back(connection: Connection, key: str, reason: str) -> Provision:
    """Have a server removed, for this reason: one in service is retired, one that is being made fails. Of one that goes already nothing changes."""
    provision = find(connection, key)
    if provision.state in MAKING:
        fail(connection, provision, reason)
    elif provision.state in IN_SERVICE:
        move(connection, provision, RETIRES, left_why=reason[:_LONGEST_WHY])
    return find(connection, key)


def warmed(connection: Connection) -> int:
    """Let those be active whose server has become so; returns how many."""
    active = sa.select(models.Server.key).where(models.Server.state == State.ACTIVE.value)
    swap = sa.update(_T).where(_T.state == State.WARMING.value, _T.key.in_(active))
    return connection.execute(swap.values(state=State.ACTIVE.value, state_at=database_now(connection))).rowcount


# --- sources ----------------------------------------------------------------------------------------------------


def set_aside(connection: Connection) -> dict[str, str]:
    """Sources that are not used any more, and why."""
    return dict(connection.execute(sa.select(models.SourceSetAside.name, models.SourceSetAside.reason)).tuples().all())


def put_aside(connection: Connection, source: str, reason: str) -> None:
    put(connection, models.SourceSetAside, [{"name": source, "reason": reason[:_LONGEST_REASON], "at": database_now(connection)}])


def use_again(connection: Connection, source: str) -> bool:
    """Whether it was set aside."""
    return connection.execute(sa.delete(models.SourceSetAside).where(models.SourceSetAside.name == source)).rowcount == 1


def has_failed(connection: Connection, source: str, since: dt.datetime) -> bool:
    """Whether a server whose host was of this source could not be made since then."""
    failed = sa.select(_T.id).where(_T.source == source, _T.state == State.FAILED.value, _T.state_at >= since, _T.host_id.is_not(None))
    return connection.execute(failed.limit(1)).first() is not None


def unfit_hosts(connection: Connection, source: str, since: dt.datetime) -> Collection[str]:
    """Hosts of a source whose making has failed since then: they are not tried again at once."""
    failed = (_T.source == source, _T.state == State.FAILED.value, _T.ended_at >= since, _T.host_id.is_not(None))
    return [host for host in connection.execute(sa.select(_T.host_id).where(*failed)).scalars() if host is not None]
