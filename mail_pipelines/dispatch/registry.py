"""The states of a server and the moves between them, as one table; leaving for good; and the silence after which a server is lost.

What belongs here: which move exists, and what has to be true of a server that goes. What does not: the heartbeat (`servers`), and what becomes of
a lost server's rows (`settlement.give_up`).

```
provisioning → active  (made, verified)
active ⇄ paused        active, paused → draining → active, paused
paused, draining → retired (nothing in hand, log read), any → retired with its host lost
active, draining → lost (by the centre, after half an hour of silence) → active, retired
active ⇄ warming       (by its warm-up; all that holds of an active server holds of a warming one)
```
"""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Claim, Server, WarmUp
from mail_pipelines.dispatch import audit, servers, settlement
from mail_pipelines.dispatch.archive import Archive, ArchiveError
from mail_pipelines.dispatch.files import DispatchError
from mail_pipelines.domains import store

# So long a server may be silent before the centre declares it lost.
LOST_AFTER = dt.timedelta(minutes=30)
# Who has not looked for so long has watched no silence: the centre was stopped, or the database away, and all seemed silent afterwards.
LONGEST_GAP = dt.timedelta(minutes=5)
# An audit, or a shipping to the end, that is later than the end of a claim by this has found all lines about it: what a rotation leaves for the next
# reader are seconds, and clocks differ by less.
LAST_LINES = dt.timedelta(minutes=5)


class ServerState(enum.StrEnum):
    # Registered while its host is being made (`provisioning`): it may speak and claims nothing.
    PROVISIONING = "provisioning"
    ACTIVE = "active"
    # Sends like an active one, but no more a day to some provider than its warm-up allows (`capacity.warm_up`).
    WARMING = "warming"
    # Claims nothing, and what is late of a claim is not sent.
    PAUSED = "paused"
    # Claims nothing; what it has in hand it ends.
    DRAINING = "draining"
    LOST = "lost"
    RETIRED = "retired"


class ServerStateError(DispatchError):
    """The server is not in a state, or has something left, that lets it go there."""


@dataclass(frozen=True)
class Move:
    """Of the `sources` a server becomes `target` when somebody says `verb`."""

    verb: str
    sources: frozenset[ServerState]
    target: ServerState


_S = ServerState
MOVES = {
    move.verb: move
    for move in (
        Move("activate", frozenset({_S.PAUSED, _S.DRAINING, _S.LOST}), _S.ACTIVE),
        Move("pause", frozenset({_S.ACTIVE, _S.WARMING, _S.DRAINING}), _S.PAUSED),
        Move("drain", frozenset({_S.ACTIVE, _S.WARMING, _S.PAUSED}), _S.DRAINING),
        Move("retire", frozenset({_S.PAUSED, _S.DRAINING, _S.LOST}), _S.RETIRED),
        # What only the centre says: of a server that it has made, of a host that is gone (also `retire`), and what follows from a warm-up.
        Move("serve", frozenset({_S.PROVISIONING}), _S.ACTIVE),
        Move("lose", frozenset({_S.PROVISIONING, _S.ACTIVE, _S.WARMING, _S.PAUSED, _S.DRAINING}), _S.LOST),
        Move("warm", frozenset({_S.ACTIVE}), _S.WARMING),
        Move("warmed", frozenset({_S.WARMING}), _S.ACTIVE),
    )
}
# Verbs that nobody types.
_OWN_VERBS = frozenset({"serve", "lose", "warm", "warmed"})


def move(connection: Connection, key: str, verb: str) -> ServerState:
    """Move a server by a verb of the table; returns its new state. Raises `ServerStateError`, which names what is possible.

    One that becomes active while its warm-up lasts is moved on, to be warming.
    """
    known = MOVES[verb]
    swap = sa.update(Server).where(Server.key == key, Server.state.in_([source.value for source in known.sources])).values(state=known.target.value)
    if connection.execute(swap).rowcount != 1:
        found = ServerState(servers.find(connection, key).state)
        possible = [f"{one.verb} → {one.target}" for one in MOVES.values() if found in one.sources and one.verb not in _OWN_VERBS]
        raise ServerStateError(f"server {key} is {found}, so it cannot become {known.target}; possible: {', '.join(possible) or 'nothing'}")
    return settle_warmth(connection, key) if verb == "activate" else known.target


def settle_warmth(connection: Connection, key: str) -> ServerState:
    """Let an active server be warming while its warm-up lasts, and no longer; returns its state."""
    server = servers.find(connection, key)
    rows = connection.execute(sa.select(WarmUp.provider, WarmUp.per_day).where(WarmUp.server_id == server.id)).all()
    # It ends with the last of the providers that were sent to; `*` stands for the others.
    used = [row for row in rows if row.provider != "*"] or rows
    warms = any(row.per_day is not None for row in used)
    if server.state == _S.ACTIVE and warms:
        return move(connection, key, "warm")
    if server.state == _S.WARMING and not warms:
        return move(connection, key, "warmed")
    return ServerState(server.state)


# --- leaving ------------------------------------------------------------------------------------------------------


def open_claims(connection: Connection, server_id: int) -> int:
    return connection.execute(sa.select(sa.func.count()).select_from(Claim).where(Claim.server_id == server_id, Claim.state != "closed")).scalar_one()


def left(connection: Connection, server: servers.ServerInfo, heartbeat_seconds: float) -> list[str]:
    """What has to happen before a server that claims nothing any more can go without a loss; nothing: it is drained."""
    found = []
    if count := open_claims(connection, server.id):
        found.append(f"{count:,} claims are open: they end within minutes, or are settled by the server's own process")
    if server.heartbeat_at is None:
        # It never ran.
        return found
    standing = audit.standings(connection).get(server.key)
    last = _last_claim(connection, server)
    if server.is_silent(database_now(connection), heartbeat_seconds):
        found.append("it is silent, so nobody knows the end of its log: start its process")
    elif audit.unread(server, standing) and not _is_after(standing.audited_at if standing is not None else None, last):
        found.append("its log has lines that were not read: the hourly audit reads them, or the job audit_delivery_logs")
    elif (reason := unshipped(server)) and not _is_after(_shipped_at(server), last):
        found.append(reason)
    return found


def _last_claim(connection: Connection, server: servers.ServerInfo) -> dt.datetime | None:
    """When the last claim ended of a server that shares its log: what comes later is the others', and has no end. None where it is alone."""
    if not server.shares_log:
        return None
    never = dt.datetime.fromtimestamp(0, dt.UTC)
    return connection.execute(sa.select(sa.func.max(Claim.closed_at)).where(Claim.server_id == server.id)).scalar_one() or never


def _is_after(moment: dt.datetime | None, last: dt.datetime | None) -> bool:
    return moment is not None and last is not None and moment - last > LAST_LINES


def _shipped_at(server: servers.ServerInfo) -> dt.datetime | None:
    health = server.health or {}
    shipped = health.get("shipped") or {}
    if not shipped.get("at") or shipped["error"]:
        return None
    # Shipped by the host's clock, and compared with ends of claims, which are the database's.
    return dt.datetime.fromtimestamp(shipped["at"] - health.get("clock_ahead", 0.0), dt.UTC)


def unshipped(server: servers.ServerInfo) -> str:
    """What of its log, by its last heartbeat, is not in the archive; "" if nothing is missing there, or it has none."""
    health = server.health or {}
    shipped = health.get("shipped")
    if shipped is None or shipped["end"] == health.get("journal"):
        return ""
    return shipped["error"] or "the end of its log is not in the archive yet: it is shipped every minute"


def retire(engine: Engine, key: str, heartbeat_seconds: float, archive: Archive | None = None) -> None:
    """Take a drained server out for good, and write into the archive of logs that its log ends there.

    Raises `ServerStateError` with what has to be waited for. Of a server that is retired only the archive is closed, where that failed before.
    """

    def work(connection: Connection) -> servers.ServerInfo:
        server = servers.find(connection, key)
        # The move first: in a state that retires, no claim is opened any more, so that what is counted below cannot grow.
        if server.state != _S.RETIRED or archive is None:
            move(connection, key, "retire")
        if waits := left(connection, server, heartbeat_seconds):
            raise ServerStateError(f"server {key} cannot be retired yet: {'; '.join(waits)}. For a host that will not come back: --lost")
        store.retire_keys_of(connection, server.id, database_now(connection))
        return server

    server = transact(engine, work)
    if archive is None or server.incarnation is None:
        return
    with reading(engine) as connection:
        boot_id = connection.execute(sa.select(Server.boot_id).where(Server.id == server.id)).scalar_one()
    try:
        archive.close(key, server.incarnation, boot_id)
    except ArchiveError as error:
        raise ArchiveError(f"server {key} is retired, but that is not in the archive: {error}. Repeat this while its process still runs") from error


def lose(engine: Engine, key: str, *, heartbeat_at: dt.datetime | None = None) -> int | None:
    """Declare a server lost: what it had in hand becomes unknown; returns how many rows, or None if it has beaten after `heartbeat_at`."""

    def work(connection: Connection) -> int | None:
        server = servers.find(connection, key)
        if heartbeat_at is not None and server.heartbeat_at != heartbeat_at:
            return None
        if server.state != _S.LOST:
            move(connection, key, "lose")
        return server.id

    server_id = transact(engine, work)
    return None if server_id is None else settlement.give_up(engine, server_id)


def retire_lost(engine: Engine, key: str) -> int:
    """Take out a server whose host will not come back; returns how many rows are unknown by that."""
    with reading(engine) as connection:
        if servers.find(connection, key).state == _S.RETIRED:
            move(connection, key, "retire")
    rows = lose(engine, key) or 0

    def work(connection: Connection) -> None:
        move(connection, key, "retire")
        store.retire_keys_of(connection, servers.find(connection, key).id, database_now(connection))

    transact(engine, work)
    return rows


# --- silence ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watch:
    """Since when servers have been seen silent, look after look, in the database's time. `at` is the last look."""

    at: dt.datetime | None = None
    since: Mapping[str, dt.datetime] = field(default_factory=dict)

    @classmethod
    def read(cls, value: Mapping[str, Any] | None) -> Watch:
        if not value or not value["at"]:
            return cls()
        return cls(dt.datetime.fromisoformat(value["at"]), {key: dt.datetime.fromisoformat(moment) for key, moment in value["since"].items()})

    def write(self) -> dict[str, Any]:
        return {"at": self.at.isoformat() if self.at else None, "since": {key: moment.isoformat() for key, moment in self.since.items()}}

    def look(self, silent: Collection[str], now: dt.datetime) -> Watch:
        """The watch after another look."""
        unbroken = self.at is not None and now - self.at <= LONGEST_GAP
        return Watch(now, {key: self.since.get(key, now) if unbroken else now for key in silent})

    def silent_for(self, span: dt.timedelta) -> set[str]:
        """Those whose silence was watched for at least so long."""
        return {key for key, since in self.since.items() if self.at is not None and self.at - since >= span}


def may_be_lost(server: servers.ServerInfo) -> bool:
    """Whether silence would mean a loss: not of a server that never ran, nor of one that somebody has paused."""
    return server.heartbeat_at is not None and server.state in (_S.ACTIVE, _S.WARMING, _S.DRAINING)
