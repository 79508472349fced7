"""A dispatch server under measurement: Exim, MariaDB, a campaign of signed messages of 16 KB, and real send sessions in processes of their own."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mail_pipelines import config, home
from mail_pipelines.benchmarks import claim, compose
from mail_pipelines.benchmarks.cpu import Meter
from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.benchmarks.postfix import free_port
from mail_pipelines.benchmarks.sign import OFFERS
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import create_engine
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.exim import instance
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.domains import store
from mail_pipelines.domains.domain import Names
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.supervision import Processes

SERVER = "bench"
_TMPFS = Path("/dev/shm")
# A send run, which also says what it cost: its processor time from its first claim to its last result, and that of the ledger in it.
_SENDER = """
import json, sys, time
from mail_pipelines import config
from mail_pipelines.database.engine import open_engine, reading
from mail_pipelines.delivery import recording
from mail_pipelines.dispatch import claims, lane, sending, servers
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
claims.open_claim = timed(claims.open_claim)
lane.record = timed(lane.record)
baseline = megabytes("VmRSS")
settings = config.load()
engine = open_engine(settings.database)
with reading(engine) as connection:
    server = servers.find(connection, sys.argv[1])
import gc; gc.freeze()
report = sending.run(engine, settings, server, sending.plan(engine, "bench", 0), 0, sys.argv[2], lambda _: None)
print(json.dumps({
    "sent": report.sent, "claims": report.claims, "reason": report.reason, "seconds": last[0] - first[0], "cpu": last[1] - first[1], "ledger": ledger,
    "megabytes": megabytes("VmHWM") - baseline,
}))
"""


@dataclass(frozen=True)
class Run:
    """What one send run did. `cpu`: seconds of processor time by group, among them `sender`; `ledger_cpu` the sender's part in claims and results."""

    sent: int
    seconds: float
    cpu: Mapping[str, float]
    ledger_cpu: float
    megabytes: float

    @property
    def rate(self) -> float:
        return self.sent / self.seconds

    def share(self, group: str) -> float:
        """The group's part of all the processor time that the run took."""
        return self.cpu[group] / sum(self.cpu.values())


@dataclass
class Dispatching:
    """The dispatch server `bench` with its database; `sink` is the process that plays all destinations."""

    settings: Settings
    environ: Mapping[str, str]
    database: MariaDB
    exim_group: int
    sink: int
    runs: int = 0

    def limit(self, connections: int) -> None:
        """Let each send run have so many connections, at any rate."""
        engine = create_engine(self.settings.database.url)
        servers.set_limits(engine, None, "*", {"connections": connections, "per_second": 1e6})
        engine.dispose()

    def send(self, seconds: float) -> Run:
        """One send run for so long, or until nothing is left."""
        assert self.database.process is not None
        database = self.database.process.pid
        meter = Meter({"exim": lambda: instance.living(self.exim_group), "database": lambda: [database], "sink": lambda: [self.sink]})
        meter.start()
        self.runs += 1
        environ = dict(self.environ) | {"MAIL_PIPELINES_SENDING__SESSION_SECONDS": str(seconds)}
        done = subprocess.run([sys.executable, "-c", _SENDER, SERVER, f"run-{self.runs}"], env=environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MailPipelinesError(f"the send run failed: {done.stderr[-2000:]}")
        said = json.loads(done.stdout.splitlines()[-1])
        if not said["sent"]:
            raise MailPipelinesError(f"the send run sent nothing: {said['reason']}")
        return Run(said["sent"], said["seconds"], {"sender": said["cpu"], **meter.stop()}, said["ledger"], said["megabytes"])


@contextmanager
def dispatching(recipients: int, destination: tuple[str, int], sink: int) -> Iterator[Dispatching]:
    """Everything set up for `recipients` messages that all go to `destination`, which the process `sink` plays."""
    # Exim's own user has to get at its folders, and its spool is on tmpfs, as on a real host.
    folders = [Path(tempfile.mkdtemp(prefix="mail-pipelines-", dir=place)) for place in (None, _TMPFS if _TMPFS.is_dir() else None)]
    for folder in folders:
        folder.chmod(0o711)
    database = MariaDB(folders[0] / "database")
    database.folder.mkdir()
    try:
        database.start()
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
        port = _fill(settings, recipients)
        with Processes() as processes:
            words = ["exim", "run", SERVER, "--hostname", "bench.example.test", "--destination", f"{destination[0]}:{destination[1]}"]
            processes.start("exim", [sys.executable, "-m", "mail_pipelines", *words], env=environ, log=folders[0] / "exim.log")
            processes.wait_until_ready(lambda: _listens(port), seconds=60, what="Exim")
            group = int((ServerFolders.of(settings.server, SERVER).run / "exim.group").read_text(encoding="ascii"))
            yield Dispatching(settings, environ, database, group, sink)
    finally:
        database.stop()
        for folder in folders:
            shutil.rmtree(folder)


def _fill(settings: Settings, recipients: int) -> int:
    """A sending campaign with its content, the key of its From domain, and the server; returns its port."""
    engine = create_engine(settings.database.url)
    claim.fill(engine, 1, recipients)
    content = compose.content(OFFERS)
    claim.add_content(engine, content, compose.FIELDS)
    now = dt.datetime.now(dt.UTC)
    store.add(engine, Names.of(content.from_address.partition("@")[2]), settings.token_key(), now)
    port = free_port()
    servers.register(engine, SERVER, kind="exim", host="127.0.0.1", port=port, now=now)
    engine.dispose()
    return port


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
