"""Benchmark: how near rate-limited servers come to the plan, N of them at once, and how long any of them idles though it might send.

Real sessions send a campaign through built-in catchers, claim by claim; sessions are started, and grants are made, by the functions that the sensors call.
Rates are low, so that the limits and not this machine's processors say how fast it goes; and slots are short (`short_slots`), so that a campaign of ten of
them takes minutes. What happens once in a slot costs a larger part of a short one. Reference: the makespan of the plan's relaxation.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines import config, home
from mail_pipelines.benchmarks import campaigns, session, short_slots
from mail_pipelines.benchmarks.contract import Result, judge
from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.benchmarks.plan import lower_bound
from mail_pipelines.capacity import allotments, planning
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import create_engine, database_now, reading
from mail_pipelines.database.models import Allotment, CampaignCounter, Server, State
from mail_pipelines.database.types import utc_now
from mail_pipelines.delivery.recording import SLOT_SECONDS, slot_at
from mail_pipelines.dispatch import openings, servers
from mail_pipelines.dispatch.catcher.store import Kept, kept
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.dispatch.openings import Opening
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.free_ports import free_port
from mail_pipelines.supervision import Processes

FLEETS, QUICK_FLEETS = (1, 2, 4, 8), (4,)
# The budget is one of campaigns of so many slots.
SLOTS, SHORT_SLOT_SECONDS, QUICK_SECONDS = 10, 30, 12.0
FINISH_TARGET, IDLE_TARGET = 1.05, 0.05
PROVIDERS = ("large", "other")
# Messages a second to each provider: that of the first server, the second, the third …, in turn.
RATES = (4.0, 2.0)
_SHARDS = 8
# At least as often in a slot as in operation, so that short campaigns are planned anew, too.
_PLAN_SECONDS = min(60.0, SLOT_SECONDS / 3)
_LOOK_SECONDS = 1.0
_START_SECONDS, _END_SECONDS = 180, 180
_PLAY = '[[rule]]\ndomains = ["*"]\nreply_seconds = [0.05, 0.05]\n'
# As a worker that is warm, which forks a process for each run.
_CONTEXT = multiprocessing.get_context("forkserver")
# Server and provider.
Line = tuple[str, str]


@dataclass(frozen=True)
class Look:
    """What was seen at `at` (epoch seconds): how many rows are open, and the lines that have an unspent grant and rows to send."""

    at: float
    open: int
    wanted: frozenset[Line]


@dataclass
class World:
    """A database and catchers that are dispatch servers; each can send to both providers."""

    settings: Settings
    environ: Mapping[str, str]
    engine: Engine
    processes: Processes
    names: list[str] = field(default_factory=list)

    def grow(self, count: int) -> None:
        """Have so many servers."""
        play = self.settings.home / "play.toml"
        play.write_text(_PLAY, encoding="ascii")
        for number in range(len(self.names), count):
            name = f"s{number + 1}"
            with reading(self.engine) as connection:
                now = database_now(connection)
            servers.register(self.engine, name, kind="catcher", host="127.0.0.1", port=free_port(), now=now)
            servers.set_limits(self.engine, name, "*", {"connections": 4, "per_second": RATES[number % len(RATES)]})
            words = [sys.executable, "-m", "mail_pipelines", "catcher", "run", name, "--play", str(play)]
            self.processes.start(name, words, env=self.environ, log=self.settings.home / "log" / f"{name}.log")
            self.names.append(name)
        self.processes.wait_until_ready(self._all_speak, seconds=_START_SECONDS, what="the catchers")

    def _all_speak(self) -> bool:
        with reading(self.engine) as connection:
            return all(server.heartbeat_at is not None for server in servers.all_servers(connection))

    def arrivals(self, since: float) -> Iterator[tuple[Line, Kept]]:
        """What has arrived since then (epoch seconds), with the line it came by."""
        for name in self.names:
            for message in kept(ServerFolders.of(self.settings.server, name).mail):
                if message.at >= since:
                    yield (name, message.recipient.rpartition("@")[2].removesuffix(".test")), message


@dataclass(frozen=True)
class Sent:
    """One campaign. Seconds: what it took, the plan's lower bound, and by line those in which it might have sent and of them those in which nothing arrived."""

    rows: int
    # In so many slots something was sent.
    slots: int
    # Recipients without a message, and messages beside the first of a recipient.
    wrong: int
    seconds: float
    bound: float
    wanted: Mapping[Line, float]
    idle: Mapping[Line, float]


def run(quick: bool, seconds: float | None = None, slot_seconds: int = SHORT_SLOT_SECONDS) -> list[Result]:
    """Campaigns that take `seconds` at least (ten slots if not given), one for each size of the fleet. Raises `MailPipelinesError` if one does not end."""
    seconds = seconds or (QUICK_SECONDS if quick else SLOTS * slot_seconds)
    return short_slots.run(slot_seconds, QUICK_FLEETS if quick else FLEETS, seconds)


def measure(fleets: Sequence[int], seconds: float) -> list[Result]:
    """The same in this process, with slots as long as they are in it."""
    results: list[Result] = []
    with _world() as world:
        for number, count in enumerate(fleets, 1):
            world.grow(count)
            results += _judged(count, _campaign(world, number, seconds))
    return results


@contextmanager
def _world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="mail-pipelines-bench-"))
    database = MariaDB(folder / "database")
    database.folder.mkdir()
    try:
        database.start()
        environ = {name: value for name, value in os.environ.items() if not name.startswith("MAIL_PIPELINES_")} | {
            "MAIL_PIPELINES_HOME": str(folder / "home"),
            "MAIL_PIPELINES_DATABASE__URL": database.database(),
            # All connections for the one run.
            "MAIL_PIPELINES_SERVER__SLOTS": "1",
        }
        home.make(environ)
        settings = config.load(environ)
        engine = create_engine(settings.database.url)
        short_slots.change(engine)
        _warm_up()
        with Processes() as processes:
            yield World(settings, environ, engine, processes)
        engine.dispose()
    finally:
        database.stop()
        shutil.rmtree(folder)


def _campaign(world: World, number: int, seconds: float) -> Sent:
    rate = sum(RATES[index % len(RATES)] for index in range(len(world.names))) * len(PROVIDERS)
    per_shard = max(len(PROVIDERS), round(seconds * rate / _SHARDS))
    campaigns.make(world.engine, number, _SHARDS, per_shard, PROVIDERS)
    campaigns.write_version(world.engine, number, campaigns.letter(20), {"first_name": "text"})
    # As for a scheduled campaign, which is planned before it begins.
    plan = planning.make(world.engine, world.settings).plan
    bound = lower_bound(plan) - plan.horizon.now
    begin = time.time()
    looks = _send(world, number, begin + 3 * bound + _END_SECONDS)
    arrived: dict[Line, list[float]] = {(name, provider): [] for name in world.names for provider in PROVIDERS}
    recipients: Counter[str] = Counter()
    for line, message in world.arrivals(begin):
        arrived[line].append(message.at)
        recipients[message.recipient] += 1
    wanted, idle = _times(looks, {line: sorted(moments) for line, moments in arrived.items()})
    end = max(max(moments, default=begin) for moments in arrived.values())
    rows = per_shard * _SHARDS
    with reading(world.engine) as connection:
        used = sa.select(sa.func.count(Allotment.slot_start.distinct())).where(Allotment.campaign_id == number, Allotment.used > 0)
        slots = connection.execute(used).scalar_one()
    return Sent(rows, slots, rows - len(recipients) + recipients.total() - len(recipients), end - begin, bound, wanted, idle)


def _send(world: World, number: int, until: float) -> list[Look]:
    """Tick, plan and look until no row is open; the sessions have ended then."""
    sessions: dict[Opening, BaseProcess] = {}
    runs = 0
    tick = plan = time.time()
    plan += _PLAN_SECONDS
    looks: list[Look] = []
    try:
        while not looks or looks[-1].open:
            world.processes.check()
            if looks:
                time.sleep(max(0.0, looks[-1].at + _LOOK_SECONDS - time.time()))
            if time.time() > until:
                raise MailPipelinesError(f"the campaign does not end: {looks[-1].open} rows are open; see {world.settings.home / 'log'}")
            sessions = {opening: process for opening, process in sessions.items() if not _over(process)}
            if time.time() >= plan:
                plan += _PLAN_SECONDS
                planning.make(world.engine, world.settings)
            if time.time() >= tick:
                tick = time.time() + world.settings.operation.sensor_seconds
                for opening in _tick(world, sessions):
                    runs += 1
                    arguments = (dict(world.environ), opening.server, opening.campaign, opening.shard, f"c{number}-{runs}")
                    sessions[opening] = _CONTEXT.Process(target=_session, args=arguments)
                    sessions[opening].start()
            with reading(world.engine) as connection:
                looks.append(_look(connection, number))
        for process in sessions.values():
            process.join(_END_SECONDS)
    finally:
        for process in sessions.values():
            process.kill()
            process.join()
    return looks


def _tick(world: World, at_work: Mapping[Opening, BaseProcess]) -> list[Opening]:
    """As the sensor `open_shards` does."""
    settings = world.settings
    allotments.fill(world.engine, settings.server.heartbeat_seconds)
    with reading(world.engine) as connection:
        now, beat = database_now(connection), settings.server.heartbeat_seconds
        return openings.find(connection, now, slots=settings.server.slots, heartbeat_seconds=beat, in_flight=at_work.keys())


def _warm_up() -> None:
    """Have the process that sessions are forks of, with all that they need."""
    _CONTEXT.set_forkserver_preload([short_slots.__name__, __name__])
    first = _CONTEXT.Process(target=os.getpid)
    first.start()
    first.join()


def _session(environ: Mapping[str, str], server: str, campaign: str, shard: int, run_id: str) -> None:
    os.environ.update(environ)
    session.main(server, campaign, shard, run_id)


def _over(process: BaseProcess) -> bool:
    """Whether a session has ended. Raises `MailPipelinesError` for one that failed, which has said why."""
    if process.exitcode:
        raise MailPipelinesError(f"a send session failed with exit code {process.exitcode}")
    return process.exitcode is not None


def _look(connection: Connection, campaign: int) -> Look:
    counts: Counter[tuple[str, State]] = Counter()
    by = (CampaignCounter.provider, CampaignCounter.state)
    query = sa.select(*by, sa.func.sum(CampaignCounter.count)).where(CampaignCounter.campaign_id == campaign)
    for provider, state, count in connection.execute(query.group_by(*by)):
        counts[provider, State(state)] = int(count)
    now = connection.execute(sa.select(utc_now())).scalar_one()
    granted = connection.execute(
        sa.select(Server.key, Allotment.provider)
        .join(Server, Server.id == Allotment.server_id)
        .where(Allotment.campaign_id == campaign, Allotment.slot_start == slot_at(now), Allotment.granted > Allotment.used)
    ).tuples()
    open_rows = sum(counts[provider, state] for provider in PROVIDERS for state in (State.PENDING, State.DEFERRED, State.CLAIMED))
    return Look(time.time(), open_rows, frozenset((key, provider) for key, provider in granted if counts[provider, State.PENDING] > 0))


def _times(looks: Sequence[Look], arrived: Mapping[Line, Sequence[float]]) -> tuple[dict[Line, float], dict[Line, float]]:
    """By line the seconds between two looks at the first of which it might have sent, and of these those in which nothing arrived."""
    wanted, idle = dict.fromkeys(arrived, 0.0), dict.fromkeys(arrived, 0.0)
    for look, following in pairwise(looks):
        for line in look.wanted:
            wanted[line] += following.at - look.at
            if bisect_right(arrived[line], look.at) == bisect_right(arrived[line], following.at):
                idle[line] += following.at - look.at
    return wanted, idle


def _judged(count: int, sent: Sent) -> list[Result]:
    name = f"{count} server{'s' if count > 1 else ''}"
    worst = max(sent.wanted, key=lambda line: sent.idle[line] / max(sent.wanted[line], _LOOK_SECONDS))
    return [
        judge(f"{name}: finish, against the plan's lower bound", sent.seconds, "s", sent.bound, target=FINISH_TARGET, better="lower"),
        judge(f"{name}: idle with grant and due rows, of the idlest", sent.idle[worst], "s", sent.wanted[worst], target=IDLE_TARGET, better="lower"),
        judge(f"{name}: slots in which it sent", sent.slots, "slots", SLOTS, target=1.0, better="higher"),
        judge(f"{name}: lost or repeated", sent.wrong, "messages", sent.rows, target=0, better="lower"),
    ]
