"""Benchmark: one campaign from the import of its contacts to its report, by a centre and several servers, each with its Exim, on this machine.

Everything is as in production but that it shares one host, whose processors bound the rate. References: the budgets of import and freeze; for the
rate, Exim's own queue runners in the same run; for what is lost or repeated, all recipients.
"""

from __future__ import annotations

import datetime as dt
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import sqlalchemy as sa
from rich.console import Console

from mail_pipelines.benchmarks import cpu, exim_queue, feeding, postfix
from mail_pipelines.benchmarks.contract import Result, judge
from mail_pipelines.cluster import campaigns, destinations, hosts, running, verdict, watch
from mail_pipelines.cluster.hosts import Centre, Server
from mail_pipelines.cluster.verdict import Verdict
from mail_pipelines.contacts import importing
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Campaign
from mail_pipelines.demo import data
from mail_pipelines.demo.reporting import reported
from mail_pipelines.dispatch import servers
from mail_pipelines.supervision import Processes

KEY = campaigns.TO_ALL_KEY
IMPORT_PER_SECOND = 50_000.0
FREEZE_SECONDS_PER_MILLION = 30.0
# What one Exim with a queue makes, of which as many would share this machine.
RATE_TARGET = 1.0
_LIMITS = {"connections": 16, "per_second": 1e5, "messages_per_connection": 500}
_RUNNERS = 4
_FREEZE_WAIT_SECONDS, _REPORT_WAIT_SECONDS = 900.0, 900.0


class Stages:
    """Seconds by the name of each stage, said as they end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        with self._console.status(name):
            yield
        self.seconds[name] = time.monotonic() - begin
        self._console.print(f"{name}: {self.seconds[name]:,.1f} s", markup=False)


def run(recipients: int, fleet: int, console: Console, *, queued: int = 1500) -> list[Result]:
    """`queued`: messages by which the rate of queue runners is measured. Raises `MailPipelinesError` if something does not work; that a count is wrong
    is a result.
    """
    queue_rate = _queue_rate(queued)
    with running.alone(), running.folders(console) as (folder, run_folder), Processes() as processes, ExitStack() as stack:
        names = [f"mx{number}" for number in range(1, fleet + 1)]
        centre, started = running.start(folder, run_folder, names, processes, stack, console)
        stages = Stages(console)
        _prepare(centre, recipients, stages)
        with console.status("starting Dagster"):
            centre.start_dagster()
            hosts.wait(processes, centre, started)
        busy, begin = cpu.busy_seconds(), time.monotonic()
        _send(centre, names, stages, console)
        busy, taken = cpu.busy_seconds() - busy, time.monotonic() - begin
        found = _count(centre, started, console)
        for line in verdict.lines(found):
            console.print(line, markup=False)
        return _results(found, stages.seconds, queue_rate, busy, taken)


def _queue_rate(queued: int) -> float:
    with postfix.sink() as (port, _), exim_queue.queueing(port) as queueing:
        feeding.send_composed(queueing.port, feeding.Messages().take(queued), 2)
        return queued / queueing.deliver(queued, _RUNNERS)


def _prepare(centre: Centre, recipients: int, stages: Stages) -> None:
    folder = centre.settings.home / "files"
    with stages.stage("writing the files (not counted)"):
        files = data.write(folder, contacts=recipients)
    with stages.stage("import"):
        for path, list_name in files.imports:
            importing.import_file(centre.engine, path, list_name=list_name, now=dt.datetime.now(dt.UTC), progress=lambda *_: centre.processes.check())
    with stages.stage("segment"):
        campaigns.segment(centre.engine, centre.settings)
    servers.set_limits(centre.engine, None, "*", _LIMITS)


def _send(centre: Centre, names: list[str], stages: Stages, console: Console) -> None:
    def frozen() -> bool:
        with reading(centre.engine) as connection:
            return connection.execute(sa.select(Campaign.state).where(Campaign.key == KEY)).scalar_one() in ("sending", "finished")

    with stages.stage("audience"):
        campaigns.start(centre.engine, centre.settings, campaigns.TO_ALL)
        centre.processes.wait_until_ready(frozen, seconds=_FREEZE_WAIT_SECONDS, what="the audience")
    with stages.stage("send"):
        watch.until_over(centre.engine, centre.processes, console, (KEY,), names)
    with stages.stage("report"):
        centre.processes.wait_until_ready(lambda: reported(centre.settings, KEY), seconds=_REPORT_WAIT_SECONDS, what="the report")


def _count(centre: Centre, fleet: list[Server], console: Console) -> Verdict:
    with console.status("counting at the destinations"):
        arrived = {server.name: destinations.count(server.destinations, server.settings.token_key()) for server in fleet}
        with reading(centre.engine) as connection:
            return verdict.judge(connection, (KEY,), arrived)


def _results(found: Verdict, seconds: dict[str, float], queue_rate: float, busy: float, taken: float) -> list[Result]:
    count = found.recipients
    import_seconds = count / IMPORT_PER_SECOND
    freeze_seconds = FREEZE_SECONDS_PER_MILLION * max(1.0, count / 1e6)
    total = sum(seconds[name] for name in ("import", "segment", "audience", "send", "report"))
    return [
        judge("import", seconds["import"], "s", import_seconds, target=1, better="lower"),
        judge("segment: snapshots of contacts and engagement", seconds["segment"], "s", total, target=1, better="lower"),
        judge("audience, from the start until it is ready to send", seconds["audience"], "s", freeze_seconds, target=1, better="lower"),
        judge("send, until nothing is open", seconds["send"], "s", total, target=1, better="lower"),
        judge("report", seconds["report"], "s", total, target=1, better="lower"),
        judge("arrived", found.per_second, "messages/s", queue_rate, target=RATE_TARGET, better="higher"),
        judge("processors that all of it kept busy, from start to report", busy / taken, "processors", os.cpu_count() or 1, target=1, better="lower"),
        judge("seconds in which all servers sent", found.together, "s", found.seconds, target=0.5, better="higher"),
        judge("lost", found.lost, "recipients", count, target=0, better="lower"),
        judge("duplicates", found.duplicates, "recipients", count, target=0, better="lower"),
        judge("unknown", found.unknown, "recipients", count, target=0, better="lower"),
        judge("disagreements of ledger, statistics and destinations", len(found.disagreements), "of all counts", len(found.rows) * 3, target=0, better="lower"),
    ]
