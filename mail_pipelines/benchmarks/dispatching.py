"""Dispatch servers under measurement: Exim, MariaDB, a campaign of signed messages of 16 KB, and real send sessions in processes of their own."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from mail_pipelines import config, home
from mail_pipelines.benchmarks import campaigns, claim, compose
from mail_pipelines.benchmarks.cpu import Meter
from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.benchmarks.postfix import wait_for_port
from mail_pipelines.benchmarks.sign import OFFERS
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import create_engine, transact
from mail_pipelines.database.models import Contact, DomainHealth
from mail_pipelines.dispatch import registry, servers
from mail_pipelines.dispatch.exim import instance
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.domains import store
from mail_pipelines.domains.domain import Names
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.free_ports import free_port
from mail_pipelines.supervision import Processes

_TMPFS = Path("/dev/shm")
_DELIVERY = re.compile(rb"^(\S+ \S+) \[\d+\] \S+ [>=]> ", re.MULTILINE)
# A send run, which also says what it cost from its first claim to its last result: processor time, of which the ledger's and the signatures'.
_SENDER = """
import json, sys, time
from mail_pipelines import config
from mail_pipelines.database.engine import open_engine, reading
from mail_pipelines.delivery import recording
from mail_pipelines.dispatch import claims, lane, sending, servers
from mail_pipelines.domains import keys
def megabytes(field):
    # Not getrusage: that counts what this process was before it became a Python of its own.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024
ledger, first, last = 0.0, None, (0.0, 0.0)
def timed(function):
    def call(*arguments, **named):
        global ledger, first, last
        first = first or (time.perf_counter(), time.process_time())
        begin = time.thread_time()
        try:
            return function(*arguments, **named)
        finally:
            ledger += time.thread_time() - begin
            last = time.perf_counter(), time.process_time()
    return call
signing = []  # a number for each signature, since several threads sign
class TimedKey:
    def __init__(self, key):
        self.key = key
    def sign(self, *arguments):
        begin = time.thread_time()
        signature = self.key.sign(*arguments)
        signing.append(time.thread_time() - begin)
        return signature
unseal = keys.unseal
keys.unseal = lambda *arguments: TimedKey(unseal(*arguments))
claims.open_claim = timed(claims.open_claim)
lane.record = timed(lane.record)
baseline = megabytes("VmRSS")
settings = config.load()
engine = open_engine(settings.database)
with reading(engine) as connection:
    server = servers.find(connection, sys.argv[1])
report = sending.run(engine, settings, server, sending.plan(engine, "bench-1", 0), 0, sys.argv[2], lambda _: None)
print(json.dumps({
    "sent": report.sent, "reason": report.reason, "seconds": last[0] - first[0], "cpu": last[1] - first[1], "ledger": ledger, "signing": sum(signing),
    "megabytes": megabytes("VmHWM") - baseline,
}))
"""


@dataclass(frozen=True)
class Run:
    """What one send run did. `rate`: messages a second in its middle half, without its start and its end.

    `cpu`: seconds of processor time by group, among them `sender`; `ledger_cpu` and `signing_cpu` are parts of the sender's.
    """

    sent: int
    seconds: float
    rate: float
    cpu: Mapping[str, float]
    ledger_cpu: float
    signing_cpu: float
    megabytes: float

    def share(self, group: str) -> float:
        """The group's part of all the processor time that the run took."""
        return self.cpu[group] / sum(self.cpu.values())


@dataclass
class Server:
    """A running dispatch server; `sinks` are the processes that play its destinations."""

    key: str
    settings: Settings
    environ: Mapping[str, str]
    database: int
    exim_group: int
    sinks: tuple[int, ...]
    runs: int = 0

    def limit(self, connections: int, mode: str = "cutthrough") -> None:
        """Let each send run have so many connections, at any rate."""
        engine = create_engine(self.settings.database.url)
        servers.set_limits(engine, self.key, "*", {"connections": connections, "per_second": 1e6, "mode": mode})
        engine.dispose()

    def send(self, seconds: float) -> Run:
        """One send run for so long, or until nothing is left."""
        meter = Meter({"exim": lambda: instance.living(self.exim_group), "database": lambda: [self.database], "sink": lambda: self.sinks})
        journal = ServerFolders.of(self.settings.server, self.key).journal
        before = journal.stat().st_size
        meter.start()
        self.runs += 1
        environ = dict(self.environ) | {"MAIL_PIPELINES_SENDING__SESSION_SECONDS": str(seconds)}
        done = subprocess.run([sys.executable, "-c", _SENDER, self.key, f"{self.key}-{self.runs}"], env=environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MailPipelinesError(f"the send run failed: {done.stderr[-2000:]}")
        said = json.loads(done.stdout.splitlines()[-1])
        if not said["sent"]:
            raise MailPipelinesError(f"the send run sent nothing: {said['reason']}")
        with journal.open("rb") as file:
            file.seek(before)
            rate = _middle_rate(file.read())
        return Run(said["sent"], said["seconds"], rate, {"sender": said["cpu"], **meter.stop()}, said["ledger"], said["signing"], said["megabytes"])


def _middle_rate(journal: bytes) -> float:
    """Deliveries a second from the first quarter of them to the last.

    As the slope of all of them in between: connections that began together deliver together, and two single moments would tell a rate by chance.
    """
    times = [dt.datetime.fromisoformat(stamp.decode("ascii")).timestamp() for stamp in _DELIVERY.findall(journal)]
    first, last = len(times) // 4, len(times) * 3 // 4
    return statistics.linear_regression(times[first:last], range(first, last)).slope


@dataclass
class Dispatching:
    """A database with a campaign to send; `server` starts dispatch servers for it, each in folders of its own."""

    settings: Settings
    environ: Mapping[str, str]
    database: int
    processes: Processes

    def spread(self, domains: int) -> None:
        """Spread the recipients over so many domains, d0.test and on, of which nothing is known."""
        engine = create_engine(self.settings.database.url)
        domain = sa.func.concat("d", Contact.id % domains, ".test")
        address = sa.func.concat("person", Contact.id, "@", domain)

        def work(connection: sa.Connection) -> None:
            connection.execute(sa.update(Contact).values(email=address, address=address, domain=domain))
            connection.execute(sa.delete(DomainHealth))

        transact(engine, work)
        engine.dispose()

    @contextmanager
    def server(self, key: str, destination: tuple[str, int], sinks: tuple[int, ...], *, silent: tuple[str, int] | None = None) -> Iterator[Server]:
        """A dispatch server all of whose mail goes to `destination`, which the processes `sinks` play, but that for the domain `silent` to its port."""
        engine = create_engine(self.settings.database.url)
        port = free_port()
        servers.register(engine, key, kind="exim", host="127.0.0.1", port=port, now=dt.datetime.now(dt.UTC))
        words = ["exim", "run", key, "--hostname", "bench.example.test", "--destination", f"{destination[0]}:{destination[1]}"]
        if silent is not None:
            words += ["--destination", f"{silent[0]}=127.0.0.1:{silent[1]}"]
        log = self.settings.home / "log" / f"{key}.log"
        exim = self.processes.start(key, [sys.executable, "-m", "mail_pipelines", *words], env=self.environ, log=log)
        wait_for_port(port, exim)
        group = int((ServerFolders.of(self.settings.server, key).run / "exim.group").read_text(encoding="ascii"))
        try:
            yield Server(key, self.settings, self.environ, self.database, group, sinks)
        finally:
            transact(engine, lambda connection: registry.move(connection, key, "pause"))
            engine.dispose()


@contextmanager
def dispatching(recipients: int) -> Iterator[Dispatching]:
    """A campaign to so many recipients, ready to send."""
    # Exim's own user has to get at its folders, and its spool is on tmpfs, as on a real host.
    folders = [Path(tempfile.mkdtemp(prefix="mail-pipelines-", dir=place)) for place in (None, _TMPFS if _TMPFS.is_dir() else None)]
    for folder in folders:
        folder.chmod(0o711)
    database = MariaDB(folders[0] / "database")
    database.folder.mkdir()
    try:
        database.start()
        assert database.process is not None
        environ = {name: value for name, value in os.environ.items() if not name.startswith("MAIL_PIPELINES_")} | {
            "MAIL_PIPELINES_HOME": str(folders[0] / "home"),
            "MAIL_PIPELINES_DATABASE__URL": database.database(),
            "MAIL_PIPELINES_SERVER__LOG_FOLDER": str(folders[0] / "log"),
            "MAIL_PIPELINES_SERVER__RUN_FOLDER": str(folders[1] / "run"),
            # All connections for the one run.
            "MAIL_PIPELINES_SERVER__SLOTS": "1",
            "MAIL_PIPELINES_SENDING__LINGER_SECONDS": "0",
        }
        home.make(environ)
        settings = config.load(environ)
        _fill(settings, recipients)
        with Processes() as processes:
            yield Dispatching(settings, environ, database.process.pid, processes)
    finally:
        database.stop()
        for folder in folders:
            shutil.rmtree(folder)


def _fill(settings: Settings, recipients: int) -> None:
    """A sending campaign with its content and the key of its From domain."""
    engine = create_engine(settings.database.url)
    claim.fill(engine, 1, recipients)
    content = compose.content(OFFERS)
    campaigns.write_version(engine, 1, content, compose.FIELDS)
    store.add(engine, Names.of(content.from_address.partition("@")[2]), settings.token_key(), dt.datetime.now(dt.UTC))
    engine.dispose()
