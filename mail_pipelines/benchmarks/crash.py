"""Benchmark: what a seeded schedule of kills does to messages on their way through real Exim.

The destinations answer after 0.05 to 5 s, sometimes drop the connection and sometimes fall silent, so that the dangerous moment, between
the final dot and the line about it, is hit all the time. Everything is counted at the destinations, by the token of each message.

For every kind of kill: nobody is mailed twice, nobody is lost, and no more messages are unknown than promise 1 allows: those whose
connection was open at the kill, those of open claims where the whole host was lost, and those that the destinations left without an answer.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from mail_pipelines.benchmarks.contract import Result, judge
from mail_pipelines.benchmarks.rig import OPEN_STATES, UNSYNCED_SECONDS, Count, Rig, rig, wait_for
from mail_pipelines.database.engine import database_now, reading
from mail_pipelines.dispatch import journal
from mail_pipelines.errors import MailPipelinesError

# A kill falls at any moment of so many seconds after messages have begun to arrive.
_ANY_MOMENT_SECONDS = 1.5
_DISK_FULL_SECONDS = 4.0
# Less than `check_log_space` in `infra/exim/dispatch.conf`.
_NO_MAIL_BYTES = 40 << 20
# From the room that sending needs to none: longer than any answer.
_DISK_FILLS_SECONDS = 12
_BEGIN_SECONDS = 240.0
# Without a kill, some row ends within this, or none ever does: longer than a lease and any answer together.
_STANDSTILL_SECONDS = 180.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Kind:
    """A kind of kill. `strike` does it and returns how many messages it may make unknown; `share` of all kills; `runs` sessions at once.

    The campaign has `recipients_per_kill`, so that it lasts: more where sending goes on while a kill is under way.
    """

    name: str
    share: float
    strike: Callable[[Rig, random.Random], int]
    runs: int = 1
    # Dagster's sensors start the sessions.
    by_dagster: bool = False
    recipients_per_kill: int = 50


def _kill_run(host: Rig, draw: random.Random) -> int:
    bound = len(host.children())
    draw.choice(host.sessions).kill()
    return bound


def _stop_run_beyond_its_lease(host: Rig, draw: random.Random) -> int:
    session = host.sessions[0]
    bound = len(host.children())
    session.signal(signal.SIGSTOP)
    if (lease := host.open_until(session.run)) is not None:

        def over() -> bool:
            with reading(host.engine) as connection:
                return database_now(connection) > lease

        wait_for(over, seconds=host.lease_seconds + 10, what="the end of the lease")
    if draw.random() < 0.5:
        # Another session settles what the stopped one has, before that one wakes.
        host.sessions.remove(session)
        host.send(host.latest, 1)
        wait_for(lambda: host.open_until(session.run) is None, seconds=120, what="the stopped run's claims are settled")
    with contextlib.suppress(ProcessLookupError):
        session.signal(signal.SIGCONT)
    return bound


def _kill_a_child_of_exim(host: Rig, draw: random.Random) -> int:
    children = host.children()
    if children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(draw.choice(children), signal.SIGKILL)
    return min(1, len(children))


def _kill_the_daemon_of_exim(host: Rig, _draw: random.Random) -> int:
    bound = len(host.children())
    os.kill(host.daemon(), signal.SIGKILL)
    host.exim.wait()
    host.start_exim()
    return bound


def _kill_the_database(host: Rig, _draw: random.Random) -> int:
    bound = len(host.children())
    host.database.kill()
    host.database.start()
    return bound


def _fill_the_log_disk(host: Rig, _draw: random.Random) -> int:
    with host.crowded_log_disk() as leave:
        # From here on Exim takes no message, so whose end finds no room has its connection now.
        leave(_NO_MAIL_BYTES)
        bound = host.open_connections()
        leave(0)
        time.sleep(_DISK_FULL_SECONDS)
    return bound


def _fill_the_log_disk_slowly(host: Rig, _draw: random.Random) -> int:
    with host.crowded_log_disk() as leave:
        for second in range(_DISK_FILLS_SECONDS, -1, -1):
            leave((journal.MIN_FREE_MB << 20) * second // _DISK_FILLS_SECONDS)
            time.sleep(1)
    # What is under way when sending stops has time to end, and room to say so.
    return 0


def _kill_the_daemon_of_dagster(host: Rig, _draw: random.Random) -> int:
    bound = len(host.children())
    host.dagster.kill()
    host.dagster.wait()
    host.start_dagster()
    return bound


def _lose_power(host: Rig, draw: random.Random) -> int:
    return host.lose_power(draw.uniform(0, UNSYNCED_SECONDS), draw.randrange(60))


KINDS = (
    Kind("send run", 0.25, _kill_run),
    Kind("send run stopped beyond its lease", 0.03, _stop_run_beyond_its_lease, recipients_per_kill=150),
    Kind("child of Exim", 0.25, _kill_a_child_of_exim),
    Kind("daemon of Exim", 0.1, _kill_the_daemon_of_exim, recipients_per_kill=200),
    Kind("MariaDB", 0.1, _kill_the_database, recipients_per_kill=200),
    Kind("log disk full", 0.05, _fill_the_log_disk, recipients_per_kill=200),
    Kind("log disk fills up", 0.02, _fill_the_log_disk_slowly, recipients_per_kill=400),
    Kind("one of two runs for one shard", 0.1, _kill_run, runs=2),
    Kind("daemon of Dagster", 0.05, _kill_the_daemon_of_dagster, by_dagster=True, recipients_per_kill=400),
    Kind("power loss", 0.05, _lose_power, recipients_per_kill=1100),
)


# In half a minute there is room for one.
_QUICK_KIND = "send run"


@dataclass(frozen=True)
class Verdict:
    """What one kind of kill did."""

    kind: str
    kills: int
    # What was asked for: a campaign that ends before it shows less than it says.
    kills_asked: int
    bound: int
    count: Count
    seconds: float


def attack(host: Rig, kind: Kind, campaign: int, kills: int, draw: random.Random, *, recipients: int) -> Verdict:
    """Send a campaign while things are killed, then undisturbed to its end."""
    begin = time.monotonic()
    host.campaign(campaign, recipients)
    if kind.by_dagster:
        host.start_dagster()
    bound = done = 0
    while done < kills and host.in_states(campaign, *OPEN_STATES):
        if not kind.by_dagster:
            host.send(campaign, kind.runs)
        before = host.arrived_bytes()
        wait_for(lambda before=before: host.arrived_bytes() > before or not host.sending(), seconds=_BEGIN_SECONDS, what="sending")  # type: ignore[misc]
        time.sleep(draw.uniform(0, _ANY_MOMENT_SECONDS))
        if host.sending():
            bound += kind.strike(host, draw)
            done += 1
    least, since = recipients + 1, 0.0
    while left := host.in_states(campaign, *OPEN_STATES):
        if left < least:
            least, since = left, time.monotonic()
        elif time.monotonic() - since > _STANDSTILL_SECONDS:
            raise MailPipelinesError(f"{kind.name}: the campaign does not end: of {left} open rows none has ended for {_STANDSTILL_SECONDS:.0f} s")
        if not kind.by_dagster:
            host.send(campaign, 1)
        time.sleep(_POLL_SECONDS)
    host.stop_dagster()
    return Verdict(kind.name, done, kills, bound, host.count(campaign), time.monotonic() - begin)


def run(
    quick: bool,
    kills: int | None = None,
    seed: int = 1,
    only: Collection[str] = (),
    report: Callable[[Verdict], None] = lambda _: None,
    *,
    mode: str = "cutthrough",
) -> list[Result]:
    """All kinds (`quick`: kills of the send run) or `only` those, one after the other, with Exim in `mode`; `report` gets each as soon as it is known.

    Each kind gets its share of `kills`, and at least two. Raises `MailPipelinesError` for a name that is no kind.
    """
    for name in only:
        if name not in (names := [kind.name for kind in KINDS]):
            raise MailPipelinesError(f"no kind of kill is named {name!r}; expected {', '.join(names)}")
    only = only or ((_QUICK_KIND,) if quick else ())
    kills = kills or (1 if quick else 1000)
    # So slow that a small campaign, too, goes on when the last one falls.
    high = 2.0 if quick else 5.0
    play: dict[str, object] = {"reply_seconds": [0.05, high], "drop_percent": 0.5, "silent_percent": 0.2, "silent_seconds": 10}
    results = []
    # A session has half of them, as of a server with two slots.
    with rig(play, connections=20 if quick else 200, lease_seconds=20, mode=mode) as host:
        for number, kind in enumerate((kind for kind in KINDS if not only or kind.name in only), 1):
            of_kind = max(2, round(kills * kind.share))
            recipients = 400 if quick else max(1000, of_kind * kind.recipients_per_kill)
            verdict = attack(host, kind, number, of_kind, random.Random(f"{seed} {kind.name}"), recipients=recipients)
            report(verdict)
            results += _judged(verdict)
    return results


def _judged(verdict: Verdict) -> list[Result]:
    count = verdict.count
    return [
        judge(f"{verdict.kind}: kills", verdict.kills, "kills", verdict.kills_asked, target=1, better="higher"),
        judge(f"{verdict.kind}: duplicates", count.duplicates, "messages", count.recipients, target=0, better="lower"),
        judge(f"{verdict.kind}: lost", count.lost, "messages", count.recipients, target=0, better="lower"),
        judge(f"{verdict.kind}: unknown", count.unknown, "messages", max(1, verdict.bound + count.unanswered), target=1, better="lower"),
    ]
