"""Dispatch servers in the central database: registration, the heartbeat by which a name has one owner, and who takes a run that names none.

A server's heartbeat is a compare-and-swap on its incarnation and the token of its last beat. A clone of the server, a second
start, or a restored image cannot make the swap; it stops itself and withdraws its permits.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.config import Settings
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Allotment, Claim, LedgerGeneration, ProviderLimit, Server
from mail_pipelines.delivery.recording import slot_at
from mail_pipelines.dispatch.claims import Memory
from mail_pipelines.dispatch.files import DispatchError, ServerFolders, boot_id, replace_file
from mail_pipelines.keys import check_key

# A server whose heartbeat is older than so many intervals is silent.
SILENT_BEATS = 3
STATES = ("active", "paused", "draining", "retired", "lost")
# How Exim hands messages of a provider on (docs/exim.md).
MODES = ("cutthrough", "burst")


class NameTaken(DispatchError):
    """Another living process speaks for this server."""


@dataclass(frozen=True)
class ServerInfo:
    """One registered server."""

    id: int
    key: str
    kind: str
    state: str
    host: str
    port: int
    incarnation: str | None
    heartbeat_at: dt.datetime | None
    health: Mapping[str, Any] | None

    def is_silent(self, now: dt.datetime, heartbeat_seconds: float) -> bool:
        return self.heartbeat_at is None or now - self.heartbeat_at > dt.timedelta(seconds=SILENT_BEATS * heartbeat_seconds)


def register(engine: Engine, key: str, *, kind: str, host: str, port: int, now: dt.datetime) -> ServerInfo:
    """Add a server, or set host and port of the one that has this key. It is active, in the default pool."""
    check_key(key, "server name")

    def work(connection: Connection) -> None:
        changed = connection.execute(sa.update(Server).where(Server.key == key).values(kind=kind, host=host, port=port))
        if not changed.rowcount:
            connection.execute(sa.insert(Server).values(key=key, kind=kind, pool_id=1, state="active", host=host, port=port, created_at=now))

    transact(engine, work)
    with reading(engine) as connection:
        return find(connection, key)


def find(connection: Connection, key: str) -> ServerInfo:
    """The server of this key; raises `DispatchError` naming those there are."""
    servers = {server.key: server for server in all_servers(connection)}
    if key not in servers:
        raise DispatchError(f"no server is called {key!r}; there are {', '.join(sorted(servers)) or 'none'}")
    return servers[key]


def all_servers(connection: Connection) -> list[ServerInfo]:
    rows = connection.execute(
        sa.select(Server.id, Server.key, Server.kind, Server.state, Server.host, Server.port, Server.incarnation, Server.heartbeat_at, Server.health).order_by(
            Server.key
        )
    )
    return [ServerInfo(**row._mapping) for row in rows]


def set_state(engine: Engine, key: str, state: str) -> None:
    """Pause, drain, activate … a server; claims look at it, so it acts within seconds."""
    if state not in STATES:
        raise DispatchError(f"no server state is called {state!r}; expected one of {', '.join(STATES)}")
    transact(engine, lambda connection: connection.execute(sa.update(Server).where(Server.key == key).values(state=state)))


def set_limits(engine: Engine, key: str | None, provider: str, limits: Mapping[str, Any]) -> None:
    """Limits of a server (or of all that have no own, with `key` None) to a provider, or to all others with `*`.

    Raises `DispatchError` for a limit that nothing could be sent under, or that is no limit.
    """
    if (mode := limits.get("mode", "cutthrough")) not in MODES:
        raise DispatchError(f"no mode is called {mode!r}; expected one of {', '.join(MODES)}")
    for name, value in limits.items():
        if value is not None and isinstance(value, int | float) and value <= 0:
            raise DispatchError(f"{name} is {value}; expected more than 0 (to stop a server, `mail-pipelines server state NAME paused`)")

    def work(connection: Connection) -> None:
        server_id = 0 if key is None else find(connection, key).id
        row = {"mode": "cutthrough", "connections": 10, "per_second": 100.0, "per_hour": None, "per_day": None, "messages_per_connection": 100} | dict(limits)
        place = (ProviderLimit.server_id == server_id, ProviderLimit.provider == provider)
        connection.execute(sa.delete(ProviderLimit).where(*place))
        connection.execute(sa.insert(ProviderLimit).values(server_id=server_id, provider=provider, **row))

    transact(engine, work)


# --- life -------------------------------------------------------------------------------------------------------


def remember(folders: ServerFolders, memory: Memory) -> None:
    """Keep on the server's own disk which life of the database it has seen, and the newest claim in it."""
    # Not synced at every claim: an older claim after a power loss is as good a witness.
    replace_file(folders.memory, json.dumps({"generation": memory.generation, "newest_claim": memory.newest_claim}), durable=False)


def recall(engine: Engine, folders: ServerFolders) -> Memory:
    """What this server remembers; if it remembers nothing, what the database says."""
    try:
        return Memory(**json.loads(folders.memory.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        # The first day, or a power loss that left the file empty.
        with reading(engine) as connection:
            memory = Memory(connection.execute(sa.select(LedgerGeneration.generation)).scalar_one())
        remember(folders, memory)
        return memory


class Heartbeat:
    """The beats of one server process. `start` takes the name, `beat` keeps it; either raises `NameTaken` if another has it."""

    def __init__(self, engine: Engine, key: str, folders: ServerFolders, interval_seconds: float) -> None:
        self._engine = engine
        self._key = key
        self._folders = folders
        self._interval = interval_seconds
        self._token_file = folders.log / "heartbeat"
        # Tokens of which one is in the database: two while it is not known whether a beat was committed.
        self._possible: list[str] = []

    def start(self) -> None:
        incarnation = self._folders.incarnation()
        token = str(uuid.uuid4())
        known = self._token_file.read_text(encoding="ascii").split() if self._token_file.exists() else []

        def work(connection: Connection) -> bool:
            server = connection.execute(
                sa.select(Server.incarnation, Server.heartbeat_token, Server.heartbeat_at).where(Server.key == self._key).with_for_update()
            ).one_or_none()
            if server is None:
                raise DispatchError(f"server {self._key} is not registered: run `mail-pipelines server add`")
            now = database_now(connection)
            fresh = server.heartbeat_at is not None and now - server.heartbeat_at < dt.timedelta(seconds=SILENT_BEATS * self._interval)
            own = server.heartbeat_token is None or (server.incarnation == incarnation and server.heartbeat_token in known)
            if fresh and not own:
                return False
            connection.execute(
                sa.update(Server)
                .where(Server.key == self._key)
                .values(incarnation=incarnation, boot_id=boot_id(), heartbeat_token=token, heartbeat_at=now, health=self._health())
            )
            return True

        self._keep([*known, token])
        if not transact(self._engine, work):
            raise NameTaken(f"another process speaks for server {self._key}: its last heartbeat is younger than {SILENT_BEATS * self._interval:.0f} s")
        self._keep([token])

    def _keep(self, tokens: list[str]) -> None:
        """Written before the database is asked and after it has answered: a kill in between loses no name."""
        self._possible = tokens
        replace_file(self._token_file, "\n".join(tokens), durable=False)

    def beat(self) -> None:
        token = str(uuid.uuid4())
        before = self._possible
        self._keep([*before, token])

        def work(connection: Connection) -> int:
            return connection.execute(
                sa.update(Server)
                .where(Server.key == self._key, Server.incarnation == self._folders.incarnation(), Server.heartbeat_token.in_(before))
                .values(heartbeat_token=token, heartbeat_at=database_now(connection), health=self._health())
            ).rowcount

        if transact(self._engine, work) != 1:
            raise NameTaken(f"another process has taken over server {self._key}: this one stops and withdraws its permits")
        self._keep([token])

    def _health(self) -> dict[str, Any]:
        return {
            "load": round(os.getloadavg()[0], 2),
            "free_mb": shutil.disk_usage(self._folders.log).free >> 20,
            "pid": os.getpid(),
            "journal": self._journal_end(),
        }

    def _journal_end(self) -> tuple[int, int] | None:
        """Inode and size of the journal: by them the centre sees whether there is anything new in it."""
        try:
            status = self._folders.journal.stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_size


# --- choice -----------------------------------------------------------------------------------------------------


def choose(connection: Connection, campaign_id: int, among: Collection[str] | None, heartbeat_seconds: float) -> ServerInfo:
    """The server for a run that names none: of the active ones that speak, that with most unspent grant for the campaign in this slot, then fewest open claims.

    `among`: only these; None: whatever host they are on. Raises `DispatchError` if there is no active server.
    """
    now = database_now(connection)
    servers = [server for server in all_servers(connection) if server.state == "active" and (among is None or server.key in among)]
    servers = [server for server in servers if not server.is_silent(now, heartbeat_seconds)]
    if not servers:
        raise DispatchError("no dispatch server is active and speaking: start the catchers with `mail-pipelines up`, or see `mail-pipelines server list`")
    unspent = dict(
        connection.execute(
            sa.select(Allotment.server_id, sa.func.sum(Allotment.granted - Allotment.used))
            .where(Allotment.campaign_id == campaign_id, Allotment.slot_start == slot_at(now))
            .group_by(Allotment.server_id)
        )
        .tuples()
        .all()
    )
    busy = dict(connection.execute(sa.select(Claim.server_id, sa.func.count()).where(Claim.state == "open").group_by(Claim.server_id)).tuples().all())
    return max(servers, key=lambda server: (int(unspent.get(server.id) or 0), -busy.get(server.id, 0)))


def of_this_host(connection: Connection, settings: Settings, key: str, *, own: str | None) -> ServerInfo:
    """The server `key`, whose journal has to be on this host. `own` is the worker's identity, if it has one. Raises `DispatchError`."""
    if own is not None and own != key:
        raise DispatchError(f"this concerns server {key}, but this worker speaks for {own}: it is refused, the next one goes to the right queue")
    server = find(connection, key)
    if not ServerFolders.of(settings.server, key).journal.exists():
        raise DispatchError(f"server {key} has no journal on this host ({settings.server.log_folder}): its runs must execute on that server")
    return server


def for_run(connection: Connection, settings: Settings, campaign_id: int, *, own: str | None, hint: str | None) -> ServerInfo:
    """The server a send run speaks for.

    A worker's identity is its configuration (`own`, from MAIL_PIPELINES_SERVER); the run's tag (`hint`) only says where it
    was meant to go, and a mismatch is refused. Where no identity is set (embedded mode) the run takes the server of its tag,
    or else the one with most unspent grant, of those whose journal is on this host. Raises `DispatchError`.
    """
    if own is not None:
        if hint is not None and hint != own:
            raise DispatchError(f"this run is meant for server {hint}, but this worker speaks for {own}: it is refused, the next one goes to the right queue")
        return find(connection, own)
    here = {server.key for server in all_servers(connection) if ServerFolders.of(settings.server, server.key).journal.exists()}
    if hint is None:
        return choose(connection, campaign_id, here, settings.server.heartbeat_seconds)
    return of_this_host(connection, settings, hint, own=None)
