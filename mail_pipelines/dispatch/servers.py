"""Dispatch servers in the central database: registration, the heartbeat by which a name has one owner, and who takes a run that names none.

A server's heartbeat is a compare-and-swap on its incarnation and the token of its last beat. A clone of the server, a second
start, or a restored image cannot make the swap; it stops itself and withdraws its permits.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines import __version__
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import SENDING_STATES, Allotment, Claim, LedgerGeneration, ProviderLimit, Recovery, Server
from mail_pipelines.database.types import utc_now
from mail_pipelines.delivery.recording import slot_at
from mail_pipelines.dispatch import clock, holds, last_checks, last_error, pools
from mail_pipelines.dispatch.claims import Memory
from mail_pipelines.dispatch.files import DispatchError, ServerFolders, boot_id, replace_file
from mail_pipelines.dispatch.journal import MIN_FREE_MB
from mail_pipelines.keys import check_key

# A server whose heartbeat is older than so many intervals is silent.
SILENT_BEATS = 3
# How Exim hands messages of a provider on (docs/exim.md).
MODES = ("cutthrough", "burst")


class NameTaken(DispatchError):
    """Another living process speaks for this server."""


class WentBack(DispatchError):
    """The database is older than this server remembers it: a backup was restored."""


@dataclass(frozen=True)
class ServerInfo:
    """One registered server."""

    id: int
    key: str
    kind: str
    state: str
    pool_id: int
    host: str
    port: int
    incarnation: str | None
    heartbeat_at: dt.datetime | None
    health: Mapping[str, Any] | None

    def is_silent(self, now: dt.datetime, heartbeat_seconds: float) -> bool:
        return self.heartbeat_at is None or now - self.heartbeat_at > dt.timedelta(seconds=SILENT_BEATS * heartbeat_seconds)

    @property
    def sends(self) -> bool:
        """Whether its state lets it claim."""
        return self.state in SENDING_STATES

    @property
    def worker(self) -> str:
        """The server by whose name its worker is known: its own, or that of the first one of a host with several."""
        return str((self.health or {}).get("worker", self.key))

    @property
    def shares_log(self) -> bool:
        """Whether other servers of its host have their lines in its log, too, by its last heartbeat."""
        return "worker" in (self.health or {})

    @property
    def shortage(self) -> str:
        """Why it claims nothing, by its last heartbeat: there is too little room for its journal. Empty if there is enough."""
        return short_of_space(self.key, (self.health or {}).get("free_mb", MIN_FREE_MB))

    @property
    def clock_error(self) -> str:
        """By how much its clock was off at its last heartbeat. Empty if it is near enough, or has not told."""
        return clock.error(self.key, (self.health or {}).get("clock_ahead", 0.0))


def short_of_space(key: str, free_mb: int) -> str:
    """What to say of a server with so much free on the disk of its journal; empty if it is enough to claim."""
    return f"the log disk of {key} has {free_mb} MB free, fewer than {MIN_FREE_MB}: it sends nothing until there is room" if free_mb < MIN_FREE_MB else ""


def register(engine: Engine, key: str, *, kind: str, host: str, port: int, now: dt.datetime, pool: str | None = None, state: str = "active") -> ServerInfo:
    """Add a server in `state`, without `pool` in the default one; or set host, port and `pool` of the one that has this key."""
    return transact(engine, lambda connection: write(connection, key, kind=kind, host=host, port=port, now=now, pool=pool, state=state))


def write(connection: Connection, key: str, *, kind: str, host: str, port: int, now: dt.datetime, pool: str | None = None, state: str = "active") -> ServerInfo:
    """As `register`, in a transaction of the caller's."""
    check_key(key, "server name")
    values: dict[str, Any] = {"kind": kind, "host": host, "port": port}
    if pool is not None:
        values["pool_id"] = pools.find(connection, pool)
    if not connection.execute(sa.update(Server).where(Server.key == key).values(**values)).rowcount:
        connection.execute(sa.insert(Server).values(key=key, state=state, created_at=now, **values))
    return find(connection, key)


def find(connection: Connection, key: str) -> ServerInfo:
    """The server of this key; raises `DispatchError` naming those there are."""
    servers = {server.key: server for server in all_servers(connection)}
    if key not in servers:
        raise DispatchError(f"no server is called {key!r}; there are {', '.join(sorted(servers)) or 'none'}")
    return servers[key]


def all_servers(connection: Connection) -> list[ServerInfo]:
    rows = connection.execute(
        sa.select(
            Server.id,
            Server.key,
            Server.kind,
            Server.state,
            Server.pool_id,
            Server.host,
            Server.port,
            Server.incarnation,
            Server.heartbeat_at,
            Server.health,
        ).order_by(Server.key)
    )
    return [ServerInfo(**row._mapping) for row in rows]


def set_limits(engine: Engine, key: str | None, provider: str, limits: Mapping[str, Any]) -> None:
    """Limits of a server (or of all that have no own, with `key` None) to a provider, or to all others with `*`.

    Raises `DispatchError` for a limit that nothing could be sent under, or that is no limit.
    """
    if (mode := limits.get("mode", "cutthrough")) not in MODES:
        raise DispatchError(f"no mode is called {mode!r}; expected one of {', '.join(MODES)}")
    for name, value in limits.items():
        if value is not None and isinstance(value, int | float) and value <= 0:
            raise DispatchError(f"{name} is {value}; expected more than 0 (to stop a server, `mail-pipelines server pause NAME`)")

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
    """What this server remembers, without its last heartbeat; on its first day what the database says.

    A life of the database that a recovery has made is not taken over here: the server first has to contribute to it (`dispatch.recovery`).
    """
    memory = _memory(folders)
    if memory is None:
        with reading(engine) as connection:
            generation, recovered, finished = _generation(connection)
        if recovered and (not finished or folders.heartbeat.exists()):
            return Memory("")
        memory = Memory(generation)
        remember(folders, memory)
    return memory


def _memory(folders: ServerFolders) -> Memory | None:
    try:
        return Memory(**json.loads(folders.memory.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        # The first day, or a power loss that left the file empty.
        return None


def _generation(connection: Connection) -> tuple[str, bool, bool]:
    """The life of the database, and whether a recovery has made it and is finished."""
    query = sa.select(LedgerGeneration.generation, Recovery.generation, Recovery.finished_at)
    row = connection.execute(query.outerjoin(Recovery, Recovery.generation == LedgerGeneration.generation)).one()
    return row[0], row[1] is not None, row[2] is not None


def _beats(folders: ServerFolders) -> tuple[list[str], dt.datetime | None]:
    """The tokens that may be in the database, and the database's time of the last beat."""
    try:
        known = json.loads(folders.heartbeat.read_text(encoding="ascii"))
        return known["tokens"], dt.datetime.fromisoformat(known["at"]) if known["at"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        # The first day, or a power loss that left the file empty.
        return [], None


def last_beat(folders: ServerFolders) -> dt.datetime | None:
    """The database's time of this server's last heartbeat that it has confirmed."""
    return _beats(folders)[1]


def check_time(connection: Connection, server_id: int, key: str, folders: ServerFolders) -> dt.datetime:
    """The database's time. Raises `WentBack` if the database is older than what this server knows of it, as after a restore, and nobody has begun to
    recover it.
    """
    last = last_beat(folders)
    known, now = connection.execute(sa.select(Server.heartbeat_at, utc_now()).where(Server.id == server_id)).one()
    if last is None or (known is not None and known >= last):
        return now
    generation, recovered, _ = _generation(connection)
    memory = _memory(folders)
    if memory.generation == generation if memory is not None else not recovered:
        raise WentBack(
            f"the database went back in time: it does not know the heartbeat of server {key} at {last:%Y-%m-%d %H:%M:%S} UTC, so rows that have been "
            "mailed may look unsent. It sends nothing until `mail-pipelines recover` has been run"
        )
    return now


class Heartbeat:
    """The beats of one server process. `start` takes the name, `beat` keeps it; either raises `NameTaken` if another has it.

    What the server knows of its beats is on its own disk: the tokens of which one is in the database (two while it is not known whether a
    beat was committed), and the database's time of the last that was. A database whose last beat is older went back in time.
    """

    def __init__(self, engine: Engine, key: str, folders: ServerFolders, interval_seconds: float, facts: Callable[[], Mapping[str, object]] = dict) -> None:
        self._engine = engine
        # What this kind of server adds to each beat.
        self._facts = facts
        self._key = key
        self._folders = folders
        self._interval = interval_seconds
        self._possible: list[str] = []
        self._last: dt.datetime | None = None

    def start(self) -> None:
        """Raises `WentBack` unless a recovery has begun: by what this server knows, rows that look unsent may have been mailed."""
        incarnation = self._folders.incarnation()
        token = str(uuid.uuid4())
        known, self._last = _beats(self._folders)

        def work(connection: Connection) -> dt.datetime | None:
            server = connection.execute(
                sa.select(Server.id, Server.incarnation, Server.heartbeat_token, Server.heartbeat_at).where(Server.key == self._key).with_for_update()
            ).one_or_none()
            if server is None:
                raise DispatchError(f"server {self._key} is not registered: run `mail-pipelines server add`")
            check_time(connection, server.id, self._key, self._folders)
            now, ahead = clock.read(connection)
            fresh = server.heartbeat_at is not None and now - server.heartbeat_at < dt.timedelta(seconds=SILENT_BEATS * self._interval)
            own = server.heartbeat_token is None or (server.incarnation == incarnation and server.heartbeat_token in known)
            if fresh and not own:
                return None
            connection.execute(
                sa.update(Server)
                .where(Server.key == self._key)
                .values(incarnation=incarnation, boot_id=boot_id(), heartbeat_token=token, heartbeat_at=now, health=self._health(ahead))
            )
            return now

        # On the first day, while there is no heartbeat yet to tell it from a later one.
        recall(self._engine, self._folders)
        self._keep([*known, token])
        beaten = transact(self._engine, work)
        if beaten is None:
            raise NameTaken(f"another process speaks for server {self._key}: its last heartbeat is younger than {SILENT_BEATS * self._interval:.0f} s")
        self._keep([token], beaten)

    def _keep(self, tokens: list[str], beaten: dt.datetime | None = None) -> None:
        """Written before the database is asked and after it has answered: a kill in between loses no name."""
        last = beaten or self._last
        replace_file(self._folders.heartbeat, json.dumps({"tokens": tokens, "at": last.isoformat() if last else None}), durable=False)
        self._possible, self._last = tokens, last

    @property
    def last(self) -> dt.datetime | None:
        """The database's time of the last beat that it has taken."""
        return self._last

    def beat(self) -> None:
        before = self._possible
        change: dict[str, str] = {}
        # Without room for another token the old one stays: whoever takes the name changes it.
        with contextlib.suppress(DispatchError):
            token = str(uuid.uuid4())
            self._keep([*before, token])
            change = {"heartbeat_token": token}

        def work(connection: Connection) -> dt.datetime | None:
            now, ahead = clock.read(connection)
            mine = (Server.key == self._key, Server.incarnation == self._folders.incarnation(), Server.heartbeat_token.in_(before))
            changed = connection.execute(sa.update(Server).where(*mine).values(**change, heartbeat_at=now, health=self._health(ahead)))
            return now if changed.rowcount == 1 else None

        beaten = transact(self._engine, work)
        if beaten is None:
            raise NameTaken(f"another process has taken over server {self._key}, or the database went back in time: this one stops and withdraws its permits")
        if change:
            with contextlib.suppress(DispatchError):
                self._keep([token], beaten)

    def _health(self, clock_ahead: float) -> dict[str, Any]:
        return {
            "release": __version__,
            "clock_ahead": round(clock_ahead, 1),
            "load": round(os.getloadavg()[0], 2),
            "free_mb": shutil.disk_usage(self._folders.journal.parent).free >> 20,
            "pid": os.getpid(),
            "journal": self._journal_end(),
            "error": last_error.read(self._folders),
            last_checks.FACT: last_checks.read(self._folders),
            **self._facts(),
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
    """The server for a run that names none: of the active and warming ones that speak and are not held, that with most unspent grant for the campaign in this
    slot, then fewest open claims.

    `among`: only these; None: whatever host they are on. Raises `DispatchError` if there is no active server.
    """
    now = database_now(connection)
    held = holds.in_force(connection)
    servers = [server for server in all_servers(connection) if server.sends and (among is None or server.key in among)]
    servers = [server for server in servers if not server.is_silent(now, heartbeat_seconds) and not held.over_server(server.id, server.pool_id)]
    allowed = pools.of_campaign(connection, campaign_id)
    servers = [server for server in servers if server.pool_id in allowed]
    if not servers:
        raise DispatchError(
            "no dispatch server of the campaign's pools is active, speaking and not held: start the catchers with `mail-pipelines up`, "
            "or see `mail-pipelines server list`"
        )
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
