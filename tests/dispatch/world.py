"""A small world for sending tests: contacts, a frozen campaign in the ledger, a registered server with its folders and limits."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.config import Settings
from mail_pipelines.contacts.addresses import parse
from mail_pipelines.contacts.providers import provider_of
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import (
    Allotment,
    Campaign,
    CampaignCounter,
    CampaignVersion,
    Claim,
    Contact,
    Delivery,
    ProviderUsage,
    Server,
    State,
)
from mail_pipelines.delivery import counters
from mail_pipelines.delivery.recording import slot_at, windows_at
from mail_pipelines.dispatch import claims, holds, servers
from mail_pipelines.dispatch.catcher.server import open_connections
from mail_pipelines.dispatch.catcher.store import Kept, kept
from mail_pipelines.dispatch.claims import Memory, NothingClaimed, OpenClaim, Sender
from mail_pipelines.dispatch.exim import instance
from mail_pipelines.dispatch.files import ServerFolders, boot_id
from mail_pipelines.dispatch.holds import Kind, Scope
from mail_pipelines.dispatch.journal import Position
from mail_pipelines.messages.compilation import compile_content
from mail_pipelines.messages.content import Content
from mail_pipelines.messages.keyring import KeyRing, derive
from mail_pipelines.messages.tokens import DeliveryToken
from tests.parts.clock import HostClock
from tests.parts.database_clock import DatabaseClock
from tests.parts.forks import Command
from tests.parts.processes import free_port, listens, wait_for

CONTENT = Content(
    subject="Hello {{ first_name }}",
    preheader="",
    from_name="Shop",
    from_address="news@shop.test",
    reply_to=None,
    body='<p>Dear {{ first_name }}, see <a href="https://shop.test/offer">the offer</a>.</p><p><a href="{{ unsubscribe_url }}">Unsubscribe</a></p>',
    body_format="html",
    text=None,
    tracking=True,
)
PROVIDERS = ("google.test", "microsoft.test", "yahoo.test", "small.test")


def settings_for(engine: sa.Engine, home: Path, *, folders: Path | None = None, **sending: Any) -> Settings:
    """Settings with quick retries, on the engine's database; run and log folders below `folders` if that is given."""
    values = {"token_key": "a key for tests", "first_retry_seconds": 1, "last_retry_seconds": 2, "linger_seconds": 3, "reply_timeout_seconds": 8} | sending
    environ = {
        "MAIL_PIPELINES_HOME": str(home),
        "MAIL_PIPELINES_DATABASE__URL": engine.url.render_as_string(hide_password=False),
        **{f"MAIL_PIPELINES_SENDING__{name.upper()}": str(value) for name, value in values.items()},
    }
    if folders is not None:
        environ |= {"MAIL_PIPELINES_SERVER__RUN_FOLDER": str(folders / "run"), "MAIL_PIPELINES_SERVER__LOG_FOLDER": str(folders / "log")}
    os.environ.update(environ)
    return config.load(environ)


@dataclass(frozen=True)
class Attack:
    """How large an attack is: where a mode takes seconds for what another does in a moment, the same attack is a smaller one.

    `connections` are those to each provider, and each of `domains` is one.
    """

    recipients: int
    kills: int
    connections: int
    per_second: float
    domains: tuple[str, ...] = PROVIDERS
    linger_seconds: int = 3

    @property
    def most_connections(self) -> int:
        """At once. In a burst each has more than one process of Exim."""
        return self.connections * len(self.domains)


@dataclass
class World:
    """`recipients` rows of one campaign in `shards` shards, on `engine`; servers are added by `server`."""

    engine: sa.Engine
    settings: Settings
    campaign_id: int = 1
    campaign_key: str = "spring"
    # Of which kind the servers are: catcher, exim, or burst, which is Exim in that mode.
    kind: str = "catcher"

    def folders(self, key: str) -> ServerFolders:
        return ServerFolders.of(self.settings.server, key)

    def server(self, key: str = "s1", **limits: Any) -> servers.ServerInfo:
        """Register a server with its incarnation, as its process would."""
        kind = "exim" if self.kind == "burst" else self.kind
        servers.register(self.engine, key, kind=kind, host="127.0.0.1", port=free_port(), now=dt.datetime.now(dt.UTC))
        self.limit(**limits)
        folders = self.folders(key)
        folders.make()
        incarnation = folders.incarnation()
        transact(
            self.engine,
            lambda connection: connection.execute(sa.update(Server).where(Server.key == key).values(incarnation=incarnation, boot_id=boot_id())),
        )
        with reading(self.engine) as connection:
            return servers.find(connection, key)

    def limit(self, **limits: Any) -> None:
        """Limits of all servers to all providers, from the next session on."""
        mode = "burst" if self.kind == "burst" else "cutthrough"
        servers.set_limits(self.engine, None, "*", {"connections": 4, "per_second": 500.0, "mode": mode} | limits)

    def sender(self, server: servers.ServerInfo) -> Sender:
        return Sender(server.id, server.key, self.folders(server.key).incarnation(), boot_id(), "run-1")

    def stop_the_clock(self) -> None:
        """The database's, so that no slot, hour or day ends between two claims: of a debit in one that is over nothing is given back."""
        with reading(self.engine) as connection:
            now = database_now(connection)
        DatabaseClock(self.engine, now)

    def grant(self, server: servers.ServerInfo, amount: int = 1_000_000) -> None:
        """Room for every provider in the current and the next slot."""
        with reading(self.engine) as connection:
            now = database_now(connection)
            providers = connection.execute(sa.select(Delivery.provider).distinct()).scalars().all()
        rows = [
            {"campaign_id": self.campaign_id, "server_id": server.id, "provider": provider, "slot_start": start, "granted": amount, "used": 0}
            for provider in providers
            for start in (slot_at(now), slot_at(now) + 900)
        ]
        transact(self.engine, lambda connection: connection.execute(sa.insert(Allotment), rows))

    def claim(
        self, server: servers.ServerInfo, *, provider: str = "google", limit: int = 100, shard: int = 0, memory: Memory | None = None
    ) -> OpenClaim | NothingClaimed:
        """Ask for rows as a session of the server does."""
        return claims.open_claim(
            self.engine,
            self.sender(server),
            memory or servers.recall(self.engine, self.folders(server.key)),
            claim_id=claims.new_id(),
            campaign_id=self.campaign_id,
            shard=shard,
            provider=provider,
            limit=limit,
            position=Position(1, 0),
            lease_seconds=self.settings.sending.lease_seconds,
        )

    def claim_from_the_first(self) -> None:
        """On MariaDB a connection goes on where its last claim ended, and for some seconds does not see what was given back before that place."""
        self.engine.dispose()

    # --- what the ledger says ---

    def states(self) -> Counter[State]:
        with reading(self.engine) as connection:
            rows = connection.execute(sa.select(Delivery.state, sa.func.count()).where(Delivery.campaign_id == self.campaign_id).group_by(Delivery.state))
            return Counter({State(state): count for state, count in rows})

    def counted(self) -> Counter[State]:
        with reading(self.engine) as connection:
            rows = connection.execute(
                sa.select(CampaignCounter.state, sa.func.sum(CampaignCounter.count))
                .where(CampaignCounter.campaign_id == self.campaign_id)
                .group_by(CampaignCounter.state)
            )
            return Counter({State(state): int(count) for state, count in rows if int(count)})

    def check_counters(self) -> None:
        assert self.counted() == self.states()

    def usage(self, server: servers.ServerInfo, provider: str) -> dict[int, int]:
        with reading(self.engine) as connection:
            rows = connection.execute(
                sa.select(ProviderUsage.window_seconds, sa.func.sum(ProviderUsage.used))
                .where(ProviderUsage.server_id == server.id, ProviderUsage.provider == provider)
                .group_by(ProviderUsage.window_seconds)
            )
            return {length: int(used) for length, used in rows}

    def open_claims(self) -> int:
        with reading(self.engine) as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(Claim).where(Claim.state != "closed")).scalar_one()

    def scope(self, kind: Kind, key: str | None) -> Scope:
        names = {Kind.CAMPAIGN: self.campaign_key, Kind.BRAND: "default", Kind.POOL: "default", Kind.SERVER: "s1", Kind.PROVIDER: "google"}
        with reading(self.engine) as connection:
            return holds.scope_of(connection, kind, key or names.get(kind, ""))

    def hold(self, kind: Kind = Kind.CAMPAIGN, key: str | None = None, reason: str = "look") -> None:
        """Hold the campaign, or another thing of this world."""
        scope = self.scope(kind, key)
        assert transact(self.engine, lambda connection: holds.place(connection, scope, reason, "tester", dt.datetime.now(dt.UTC)))

    def release(self, kind: Kind = Kind.CAMPAIGN, key: str | None = None) -> None:
        scope = self.scope(kind, key)
        assert transact(self.engine, lambda connection: holds.release(connection, scope, "tester", dt.datetime.now(dt.UTC)))

    def held(self) -> str | None:
        """Why the campaign is held, if it is."""
        with reading(self.engine) as connection:
            hold = holds.in_force(connection).over_campaign(self.campaign_id, 1, None)
        return hold.reason if hold else None

    def hold_of_everything(self) -> holds.Hold | None:
        with reading(self.engine) as connection:
            return next((hold for hold in holds.in_force(connection).holds if hold.scope == Scope()), None)

    def set_server(self, key: str, **values: Any) -> None:
        transact(self.engine, lambda connection: connection.execute(sa.update(Server).where(Server.key == key).values(**values)))

    def set_campaign(self, **values: Any) -> None:
        transact(self.engine, lambda connection: connection.execute(sa.update(Campaign).where(Campaign.id == self.campaign_id).values(**values)))

    # --- what the far end says ---

    def kept(self) -> list[Kept]:
        return list(kept(Path(self.settings.server.mail_folder)))

    def copies(self) -> Counter[int]:
        """How many copies of this campaign each contact got, by the tokens of what the catchers keep."""
        ring = self.ring()
        tokens = [ring.read_delivery(message.token)[0] for message in self.kept()]
        return Counter(token.contact_id for token in tokens if token.campaign_id == self.campaign_id)

    def ring(self) -> KeyRing:
        """The keys under which a centre accepts tokens."""
        with reading(self.engine) as connection:
            fleet = {server.id: server.key for server in servers.all_servers(connection)}
        return KeyRing.of(self.settings.token_key(), fleet)


def make_world(
    engine: sa.Engine, home: Path, *, recipients: int = 100, shards: int = 1, kind: str = "catcher", domains: tuple[str, ...] = PROVIDERS, **sending: Any
) -> World:
    """A campaign `spring` in state sending with so many pending rows."""
    world = World(engine, settings_for(engine, home, folders=None if kind == "catcher" else _open_folders(), **sending), kind=kind)
    now = dt.datetime.now(dt.UTC)
    compiled = compile_content(CONTENT, {"first_name": "text"}, lambda urls: list(range(1, len(urls) + 1)))
    addresses = [parse(f"person{number}@{domains[(number - 1) % len(domains)]}") for number in range(1, recipients + 1)]

    def work(connection: sa.Connection) -> None:
        connection.execute(
            sa.insert(Campaign).values(
                id=world.campaign_id,
                key=world.campaign_key,
                name="Spring",
                state="sending",
                brand_id=1,
                segments={"include": [], "exclude": []},
                unsubscribe="all",
                on_unknown="hold",
                priority=1,
                expire_at=now + dt.timedelta(days=2),
                shards=shards,
                version_id=1,
                created_at=now,
                updated_at=now,
                started_at=now,
            )
        )
        connection.execute(
            sa.insert(CampaignVersion).values(
                id=1,
                campaign_id=world.campaign_id,
                number=1,
                source=CONTENT.to_document(),
                sha256=compiled.sha256,
                compiled=compiled.to_bytes(),
                created_at=now,
            )
        )
        connection.execute(
            sa.insert(Contact),
            [
                {
                    "id": number,
                    "email": address.email,
                    "address": address.address,
                    "address_hash": address.hash,
                    "domain": address.domain,
                    "provider": provider_of(address.domain),
                    "attributes": {"first_name": f"Name{number}"},
                    "tracking_allowed": True,
                    "created_at": now,
                    "updated_at": now,
                }
                for number, address in enumerate(addresses, 1)
            ],
        )
        rows = [
            {
                "campaign_id": world.campaign_id,
                "contact_id": number,
                "address_hash": address.hash,
                "shard": number % shards,
                "provider": provider_of(address.domain),
                "state": int(State.PENDING),
                "sort_key": number,
                "attempt": 0,
                "variant": 0,
            }
            for number, address in enumerate(addresses, 1)
        ]
        connection.execute(sa.insert(Delivery), rows)
        moves = Counter((int(str(row["shard"])), str(row["provider"]), State.PENDING, "") for row in rows)
        counters.add(connection, world.campaign_id, 0, moves, now)

    transact(engine, work)
    return world


def _open_folders() -> Path:
    """A folder that Exim's own user may pass, which the folders of tests are not. `Servers.stop` removes it."""
    folder = Path(tempfile.mkdtemp(prefix="mail-pipelines-"))
    folder.chmod(0o711)
    return folder


class Running:
    """A server process of its own, as `mail-pipelines catcher run` or `exim run` starts it."""

    def __init__(self, world: World, server: servers.ServerInfo, play: Path, *destinations: str, clock: HostClock | None = None) -> None:
        self.world, self.server, self.play, self.clock = world, server, play, clock
        # Of some domains, as options of `exim run`.
        self.elsewhere = [word for destination in destinations for word in ("--destination", destination)]
        self.folders = world.folders(server.key)
        self.start()

    def start(self) -> None:
        self.process = self.command("catcher", "run", self.server.key, "--play", str(self.play), port=self.server.port)

    def command(self, *words: str, port: int) -> Command | subprocess.Popen[bytes]:
        """Start a `mail-pipelines` command and wait until it listens on `port`."""
        output = self.folders.log / "process.log"
        process: Command | subprocess.Popen[bytes]
        # Destinations are other hosts.
        if self.clock is not None and port == self.server.port:
            with output.open("ab") as log:
                by_the_clock = [sys.executable, "-m", "tests.parts.clock", str(self.clock.file), *words]
                process = subprocess.Popen(by_the_clock, env=self.environment, stdout=log, stderr=log)
        else:
            process = Command(*words, environ=self.environment, output=output)

        def ready() -> bool:
            assert process.poll() is None, output.read_text()[-2000:]
            return self.serves(process, port)

        wait_for(ready, seconds=30, what=" ".join(words[:3]))
        return process

    @property
    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def serves(self, process: Command | subprocess.Popen[bytes], port: int) -> bool:
        return listens(port)

    def connections(self) -> int:
        """How many connections the mail server has open."""
        return open_connections(self.folders)

    def kill(self) -> int:
        """SIGKILL; returns how many connections it had open."""
        self.process.kill()
        self.process.wait()
        return self.connections()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


class RunningExim(Running):
    """Exim, with a catcher that plays the destinations behind it."""

    def start(self) -> None:
        if not hasattr(self, "destinations"):
            self.far = free_port()
            self.destinations = self.command(
                "catcher", "destinations", f"far-{self.server.key}", "--port", str(self.far), "--play", str(self.play), port=self.far
            )
        words = ("exim", "run", *self.as_whom, "--destination", f"127.0.0.1:{self.far}", *self.elsewhere)
        self.process = self.command(*words, port=self.server.port)

    @property
    def as_whom(self) -> tuple[str, ...]:
        return self.server.key, "--hostname", "mail.example.test"

    def serves(self, process: Command | subprocess.Popen[bytes], port: int) -> bool:
        """An Exim that a killed process has left listens, too; and it listens a moment before it writes its first line."""
        if port != self.server.port:
            return listens(port)
        try:
            parent = int(Path(f"/proc/{self.daemon()}/stat").read_bytes().rpartition(b")")[2].split()[1])
        except FileNotFoundError:
            return False
        return parent == process.pid and listens(port) and self.folders.journal.exists()

    def at_destinations(self) -> int:
        """How many connections the destinations have had."""
        return self.world.folders(f"far-{self.server.key}").journal.read_bytes().count(b" MARK ")

    def daemon(self) -> int:
        return int((self.folders.run / "exim.group").read_text())

    def children(self) -> list[int]:
        """Exim's processes beside the daemon: one for each connection."""
        return [pid for pid in instance.living(self.daemon()) if pid != self.daemon()]

    def connections(self) -> int:
        return len(self.children())

    def kill(self) -> int:
        """SIGKILL the whole of it at once: the process that watches, the daemon and all its children."""
        self.process.kill()
        killed = {self.daemon()}
        while living := instance.living(self.daemon()):
            for pid in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed.update(living)
        self.process.wait()
        return len(killed) - 1

    def stop(self) -> None:
        super().stop()
        assert instance.living(self.daemon()) == []
        self.destinations.terminate()
        self.destinations.wait(20)


class RunningTwo(RunningExim):
    """One Exim of the servers s1 and s2, which by their own settings send from 127.0.0.11 and 127.0.0.12."""

    @property
    def as_whom(self) -> tuple[str, ...]:
        return ("s1,s2",)

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {config.SERVER_VARIABLE: "s1,s2"}


class Servers:
    """The servers that a test has started, for their end."""

    def __init__(self) -> None:
        self._running: list[Running] = []

    def start(self, world: World, server: servers.ServerInfo, play: Path, *destinations: str, clock: HostClock | None = None) -> Any:
        """Start the server `server` of the world's kind, with destinations that behave as `play` says; `destinations` of some domains are elsewhere.

        All its processes go by `clock`, if that is given.
        """
        return self._keep((Running if world.kind == "catcher" else RunningExim)(world, server, play, *destinations, clock=clock))

    def start_two(self, world: World, play: Path, **limits: Mapping[str, Any]) -> tuple[RunningTwo, dict[str, World]]:
        """Start one Exim for the servers s1 and s2, with limits and token keys of their own; the world as each of them sees it."""
        own = world.settings.home / "servers"
        own.mkdir(parents=True)
        for number, key in enumerate(("s1", "s2"), 1):
            words = [f'address = "127.0.0.1{number}"', f'hostname = "{key}.example.test"', *(['exim = "s1"'] if number == 2 else [])]
            secrets = ["[sending]", f'token_key = "{derive(world.settings.token_key(), key).decode()}"']
            (own / f"{key}.toml").write_text("\n".join(["[server]", *words, *secrets]), encoding="utf-8")
        worlds = {key: replace(world, settings=config.load_for(key)) for key in ("s1", "s2")}
        infos = {key: one.server(key) for key, one in worlds.items()}
        for key, values in limits.items():
            servers.set_limits(world.engine, key, "*", {"mode": "burst" if world.kind == "burst" else "cutthrough"} | dict(values))
        for key, one in worlds.items():
            one.grant(infos[key])
        return self._keep(RunningTwo(worlds["s1"], infos["s1"], play)), worlds

    def _keep(self, running: Any) -> Any:
        self._running.append(running)
        return running

    def stop(self) -> None:
        for running in self._running:
            running.stop()
        for folder in {Path(running.world.settings.server.run_folder).parent for running in self._running if running.world.kind != "catcher"}:
            shutil.rmtree(folder)


def write_play(path: Path, **rule: Any) -> Path:
    """A play file with one rule for all domains."""
    import json

    values = {"domains": ["*"], "reply_seconds": [0.0, 0.01]} | rule
    path.write_text("[[rule]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()), encoding="utf-8")
    return path


__all__ = ["Attack", "DeliveryToken", "Running", "RunningExim", "Servers", "World", "make_world", "settings_for", "windows_at", "write_play"]
