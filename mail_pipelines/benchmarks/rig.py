"""A host that can be broken: MariaDB, one Exim as dispatch server, the destinations behind it, send sessions, all as processes of their own.

What belongs here: starting each part, reaching its processes, and counting what arrived. What does not: what is broken, and when (`crash`).

Two things are played, and need root: the log disk is a small file system in memory, so that it can be filled, and every process sees
a boot id of ours (a mount of its own over the kernel's), so that a power loss is followed by another boot.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from mail_pipelines import config, home
from mail_pipelines.benchmarks import campaigns
from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.database.engine import create_engine, reading
from mail_pipelines.database.models import Claim, Delivery, State
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.catcher import log as catcher_log
from mail_pipelines.dispatch.catcher.store import kept
from mail_pipelines.dispatch.exim import instance
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.dispatch.journal import Kind
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.free_ports import free_port
from mail_pipelines.messages.tokens import read_delivery

SERVER = "bench"
_FAR = "far"
_LOG_DISK_BYTES = 512 << 20
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
# How far back a power loss may take the log: a file that nobody syncs is written to disk after 30 s.
UNSYNCED_SECONDS = 30.0
_SAMPLE_SECONDS = 0.1
# First argument: the file with the boot id. Then the program.
_BOOTED = ("unshare", "--mount", "sh", "-c", f'mount --bind "$1" {_BOOT_ID} && shift && exec "$@"', "boot")
OPEN_STATES = (State.PENDING, State.CLAIMED, State.DEFERRED)


def wait_for(condition: Callable[[], object], *, seconds: float, what: str) -> None:
    """Poll `condition` until it is true. Raises `MailPipelinesError` after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise MailPipelinesError(f"waited {seconds:.0f} s in vain: {what}")
        time.sleep(0.02)


@dataclass(frozen=True)
class Count:
    """What became of the recipients of a campaign: copies and own silences at the destinations, states in the ledger."""

    recipients: int
    arrived: int
    duplicates: int
    # Neither at a destination nor called unknown; or called delivered, and not at a destination.
    lost: int
    unknown: int
    # Messages to which the destinations themselves gave no answer.
    unanswered: int


@dataclass(frozen=True)
class Session:
    """A send session and its process."""

    run: str
    process: subprocess.Popen[bytes]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Rig:
    """See the module; made by `rig`."""

    folder: Path
    # SMTP settings of the destinations, as in a play file.
    play: dict[str, object]
    connections: int
    lease_seconds: int
    mode: str
    sessions: list[Session] = field(default_factory=list)
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _servers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _sizes: deque[tuple[float, int]] = field(default_factory=deque)
    _over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.database = MariaDB(self.folder / "database")
        self._log_disk = self.folder / "log" / SERVER

    def start(self) -> None:
        for name in ("run", "log", "mail", "database"):
            (self.folder / name).mkdir()
        self._log_disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_LOG_DISK_BYTES},mode=755", "tmpfs", self._log_disk], check=True)
        self._new_boot()
        self.database.start()
        self.environ = {
            **os.environ,
            "MAIL_PIPELINES_HOME": str(self.folder / "home"),
            "MAIL_PIPELINES_DATABASE__URL": self.database.database(),
            **{f"MAIL_PIPELINES_SERVER__{name.upper()}_FOLDER": str(self.folder / name) for name in ("run", "log", "mail")},
            "MAIL_PIPELINES_SENDING__TOKEN_KEY": secrets.token_hex(16),
            "MAIL_PIPELINES_SENDING__LEASE_SECONDS": str(self.lease_seconds),
            "MAIL_PIPELINES_SENDING__REPLY_TIMEOUT_SECONDS": "8",
            "MAIL_PIPELINES_SENDING__LINGER_SECONDS": "3",
            "MAIL_PIPELINES_SENDING__FIRST_RETRY_SECONDS": "1",
            "MAIL_PIPELINES_SENDING__LAST_RETRY_SECONDS": "1",
        }
        home.make(self.environ)
        self.environ["DAGSTER_HOME"] = str(self.folder / "home" / "dagster")
        self.settings = config.load(self.environ)
        self.engine = create_engine(self.settings.database.url)
        self.folders = ServerFolders.of(self.settings.server, SERVER)
        port = free_port()
        servers.register(self.engine, SERVER, kind="exim", host="127.0.0.1", port=port, now=dt.datetime.now(dt.UTC))
        servers.set_limits(self.engine, None, "*", {"mode": self.mode, "connections": self.connections, "per_second": 1e5})
        self._far_port = free_port()
        (self.folder / "play.toml").write_text("[[rule]]\ndomains = ['*']\n" + "".join(f"{name} = {value}\n" for name, value in self.play.items()))
        self._far = self._run("catcher", "destinations", _FAR, "--port", str(self._far_port), "--play", str(self.folder / "play.toml"))
        self._servers.append(self._far)
        wait_for(lambda: _listens(self._far_port), seconds=120, what="the destinations listen")
        self.start_exim()
        threading.Thread(target=self._watch_journal, daemon=True).start()

    def stop(self) -> None:
        self._over.set()
        for session in self.sessions:
            session.kill()
        self.stop_dagster()
        for process in self._servers:
            process.terminate()
            process.wait()
        self.database.stop()
        subprocess.run(["umount", "--lazy", self._log_disk], check=False, stderr=subprocess.DEVNULL)

    # --- processes ---

    def _run(self, *words: str) -> subprocess.Popen[bytes]:
        return self.spawn("mail_pipelines", *words, output=f"{words[0]}.out")

    def spawn(self, module: str, *words: str, output: str, new_session: bool = False) -> subprocess.Popen[bytes]:
        """Start a Python module as a process of this host."""
        with (self.folder / output).open("ab") as file:
            argv = (*_BOOTED, str(self._boot), sys.executable, "-m", module, *words)
            return subprocess.Popen(argv, env=self.environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=new_session)

    def start_exim(self) -> None:
        """Start Exim, or what is left of it again."""
        with reading(self.engine) as connection:
            port = servers.find(connection, SERVER).port
        self._servers = [process for process in self._servers if process.poll() is None]
        self.exim = self._run("exim", "run", SERVER, "--hostname", "mail.example.test", "--destination", f"127.0.0.1:{self._far_port}")
        self._servers.append(self.exim)

        def ready() -> bool:
            if self.exim.poll() is not None:
                raise MailPipelinesError(f"Exim did not start: {(self.folder / 'exim.out').read_text()[-1000:]}")
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
                parent = int(Path(f"/proc/{self.daemon()}/stat").read_bytes().rpartition(b")")[2].split()[1])
                return parent == self.exim.pid and _listens(port)
            return False

        wait_for(ready, seconds=120, what="Exim listens")

    def daemon(self) -> int:
        return int((self.folders.run / "exim.group").read_text())

    def children(self) -> list[int]:
        """Exim's processes beside the daemon, one for each connection."""
        return [pid for pid in instance.living(self.daemon()) if pid != self.daemon()]

    def open_connections(self) -> int:
        """How many messages may be at destinations: each of Exim's processes has one at most, and so has each connection of a session."""
        return min(len(self.children()), self.connections * max(1, len(self.sessions)))

    def send(self, campaign: int, runs: int) -> None:
        """Have so many sessions of the campaign's only shard at work, and Exim."""
        if self.exim.poll() is not None:
            self.start_exim()
        self.sessions = [session for session in self.sessions if session.process.poll() is None]
        while len(self.sessions) < runs:
            run = f"run-{uuid.uuid4().hex[:8]}"
            self.latest = campaign
            process = self.spawn("mail_pipelines.benchmarks.session", SERVER, f"bench-{campaign}", "0", run, output="sessions.out")
            self.sessions.append(Session(run, process))

    def start_dagster(self) -> None:
        """Start Dagster's daemon, whose sensors start send runs. What an earlier daemon has left running goes on."""
        self.dagster = self.spawn(
            "mail_pipelines.dagster_process", "daemon", "-w", str(home.checkout() / "workspace.yaml"), output="dagster.out", new_session=True
        )
        self._daemons.append(self.dagster)

    def stop_dagster(self) -> None:
        """End all daemons there were, with their code servers and runs."""
        for daemon in self._daemons:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()
        self._daemons.clear()

    def lose_power(self, unsynced_seconds: float, torn_bytes: int) -> int:
        """End everything at once and boot again, without what the journal got in the last seconds and so many bytes before that.

        Returns how many rows were claimed: before Exim's process is there again, which settles them.
        """
        group = self.daemon()
        for process in (self.exim, *(session.process for session in self.sessions)):
            process.kill()
        while living := instance.living(group):
            for pid in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.database.kill()
        for process in (self.exim, *(session.process for session in self.sessions)):
            process.wait()
        self.sessions.clear()
        then = time.monotonic() - unsynced_seconds
        size = next((size for moment, size in reversed(self._sizes) if moment <= then), self._sizes[0][1])
        os.truncate(self.folders.journal, max(0, size - torn_bytes))
        shutil.rmtree(self.folders.run)
        self._new_boot()
        self.database.start()
        claimed = self.in_states(self.latest, State.CLAIMED)
        self.start_exim()
        return claimed

    @contextmanager
    def crowded_log_disk(self) -> Iterator[Callable[[int], None]]:
        """Yields what leaves no more than so many bytes free on the log disk. They are free again when the block ends."""
        ballast = self._log_disk / "ballast"
        with ballast.open("wb", buffering=0) as file:

            def leave(size: int) -> None:
                # Others write at the same time, so what is free has to be taken piece by piece.
                for piece in (_LOG_DISK_BYTES // 64, 4096):
                    with contextlib.suppress(OSError):
                        while shutil.disk_usage(ballast).free >= max(size + piece, 1) and file.write(bytes(piece)) == piece:
                            pass

            try:
                yield leave
            finally:
                ballast.unlink()

    # --- the far end and the ledger ---

    def sending(self) -> bool:
        """Whether somebody sends, or will: a session that was started here, or Dagster."""
        return bool(self._daemons) or any(session.process.poll() is None for session in self.sessions)

    def campaign(self, campaign: int, recipients: int) -> None:
        campaigns.make(self.engine, campaign, 1, recipients)
        campaigns.write_version(self.engine, campaign, campaigns.letter(20), {"first_name": "text"})

    def arrived_bytes(self) -> int:
        """Grows with every message that a destination takes."""
        return sum(path.stat().st_size for path in (self.folder / "mail" / _FAR).glob("*.mail"))

    def states(self, campaign: int) -> dict[int, State]:
        with reading(self.engine) as connection:
            rows = connection.execute(sa.select(Delivery.contact_id, Delivery.state).where(Delivery.campaign_id == campaign))
            return {row.contact_id: State(row.state) for row in rows}

    def in_states(self, campaign: int, *states: State) -> int:
        with reading(self.engine) as connection:
            wanted = [int(state) for state in states]
            found = sa.select(sa.func.count()).select_from(Delivery).where(Delivery.campaign_id == campaign, Delivery.state.in_(wanted))
            return int(connection.execute(found).scalar_one())

    def open_until(self, run: str) -> dt.datetime | None:
        """When the last lease of a session's open claims ends; None if it has none."""
        with reading(self.engine) as connection:
            return connection.execute(sa.select(sa.func.max(Claim.lease_until)).where(Claim.run_id == run, Claim.state == "open")).scalar_one()

    def count(self, campaign: int) -> Count:
        """The campaign's equation, by the token of every message that arrived."""
        key = self.settings.token_key()
        tokens = (read_delivery(message.token, key) for message in kept(self.folder / "mail" / _FAR))
        copies = Counter(token.contact_id for token in tokens if token.campaign_id == campaign)
        states = self.states(campaign)
        accounted = {State.UNKNOWN, State.UNRESOLVED}
        lost = sum(contact not in copies and state not in accounted for contact, state in states.items())
        return Count(
            len(states), len(copies), sum(copies.values()) - len(copies), lost, sum(state in accounted for state in states.values()), self._unanswered(campaign)
        )

    def _unanswered(self, campaign: int) -> int:
        key = self.settings.token_key()
        found = set()
        with (self.folder / "log" / _FAR / "main.log").open("rb") as file:
            for line in file:
                entry = catcher_log.parse(line.rstrip(b"\n"))
                if entry is not None and entry.outcome is not None and entry.outcome.kind is Kind.UNKNOWN:
                    found.add(entry.token)
        return sum(read_delivery(token, key).campaign_id == campaign for token in found)

    # --- played parts of the host ---

    def _watch_journal(self) -> None:
        while not self._over.wait(_SAMPLE_SECONDS):
            with contextlib.suppress(FileNotFoundError):
                self._sizes.append((time.monotonic(), self.folders.journal.stat().st_size))
            while self._sizes and self._sizes[0][0] < time.monotonic() - 2 * UNSYNCED_SECONDS:
                self._sizes.popleft()

    def _new_boot(self) -> None:
        self._boot = self.folder / f"boot-{uuid.uuid4().hex}"
        self._boot.write_text(f"{uuid.uuid4()}\n")
        self._boot.chmod(0o644)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def rig(play: dict[str, object], *, connections: int, lease_seconds: int, mode: str) -> Iterator[Rig]:
    """A running rig. Raises `MailPipelinesError` for a user who may not mount."""
    if os.geteuid() != 0:
        raise MailPipelinesError("this benchmark fills a disk and plays a power loss with mounts of its own: run it as root")
    folder = Path(tempfile.mkdtemp(prefix="mail-pipelines-crash-"))
    # Exim's own user has to pass.
    folder.chmod(0o711)
    host = Rig(folder, play, connections, lease_seconds, mode)
    try:
        host.start()
        yield host
    finally:
        host.stop()
        shutil.rmtree(folder)
