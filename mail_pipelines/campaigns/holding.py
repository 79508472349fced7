"""What an operator decides about holds, by names. Campaigns take note of it (`states`); all other scopes are only looked up."""

from __future__ import annotations

import datetime as dt

from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns import states
from mail_pipelines.database.engine import transact
from mail_pipelines.dispatch import holds
from mail_pipelines.dispatch.holds import HoldError, Kind


def hold(engine: Engine, kind: Kind, key: str, reason: str, by_whom: str, now: dt.datetime) -> str:
    """Hold what is named, and say so. Raises `HoldError` for a name that does not exist, what is held already, or a campaign that is over."""
    what = f"{kind} {key}".strip()

    def work(connection: Connection) -> bool:
        scope = holds.scope_of(connection, kind, key)
        if kind is Kind.CAMPAIGN:
            return states.hold(connection, scope.id, reason, now, by_whom)
        return holds.place(connection, scope, reason, by_whom, now)

    if not transact(engine, work):
        raise HoldError(f"{what} is held already{' or over' if kind is Kind.CAMPAIGN else ''}: see `mail-pipelines hold list`")
    return f"{what} is held"


def release(engine: Engine, kind: Kind, key: str, by_whom: str, now: dt.datetime) -> str:
    """Release what is named, and say what else is still held. Raises `HoldError` for a name that does not exist, or what is not held."""
    what = f"{kind} {key}".strip()

    def work(connection: Connection) -> tuple[bool, list[str]]:
        scope = holds.scope_of(connection, kind, key)
        released = states.release(connection, scope.id, by_whom, now) if kind is Kind.CAMPAIGN else holds.release(connection, scope, by_whom, now)
        return released, [hold.what for hold in holds.in_force(connection).holds]

    released, left = transact(engine, work)
    if not released:
        raise HoldError(f"{what} is not held; held: {', '.join(left) or 'nothing'}")
    return f"{what} is released{'; still held: ' + ', '.join(left) if left else ''}"
