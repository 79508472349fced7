"""The clock of a whole host with Exim is five minutes off, and is set while it sends: counted at the far end."""

from __future__ import annotations

import datetime as dt
import email
import email.utils
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import CampaignMinute, Delivery, ProviderUsage, State
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.holds import Kind
from mail_pipelines.dispatch.journal import Kind as Ending
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.test_clocks import GREYLIST_SECONDS, OFF_SECONDS, RETRY_SECONDS, entries, kept_by, open_claims_of
from tests.dispatch.test_crashes import check_promise
from tests.dispatch.world import Servers, World, make_world
from tests.parts import clock
from tests.parts.clock import HostClock
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(400), pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]
# Of so many recipients a quarter is at each provider.
RECIPIENTS = 160
# Limits of the server whose clock is off, and of the other one.
PER_SECOND, YAHOO_PER_HOUR = 3.0, 6
OTHER_PER_SECOND, OTHER_YAHOO_PER_SECOND = 0.5, 4.0
# Beside the turn that it has, a message may wait for a late reply to the one before on its connection.
LONGEST_REPLY_SECONDS = 1.0
WINDOW_SECONDS = 5
PLAY = f"""
[[rule]]
domains = ["yahoo.test"]
reply_seconds = [0.0, 0.1]

[[rule]]
domains = ["*"]
reply_seconds = [0.1, {LONGEST_REPLY_SECONDS}]
drop_percent = 2
silent_percent = 2
silent_seconds = 3
greylist_percent = 20
greylist_seconds = {GREYLIST_SECONDS}
"""
# What Exim's daemon writes with its children, and what a delivery from the queue does, which is a program started anew.
LINES = {"exim": (" MARK ", " INTENT ", " <= ", " >> "), "burst": (" MARK ", " INTENT ", " <= ", " => ", " Completed")}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Begins before the servers, and so ends after them."""
    yield
    clock.clean()


def clock_errors_of(world: World) -> dict[str, str]:
    """What the last beats told of the servers' clocks."""
    with reading(world.engine) as connection:
        return {server.key: server.clock_error for server in servers.all_servers(connection)}


def times_of(world: World, key: str, words: str) -> list[float]:
    """The stamps of the lines of Exim's log with these words (epoch seconds)."""
    lines = world.folders(key).journal.read_text("utf-8", "replace").splitlines()
    return [dt.datetime.fromisoformat(f"{line[:23]}+00:00").timestamp() for line in lines if line.startswith("20") and words in line]


# Each is ahead for a part of it, and behind for another.
@pytest.mark.parametrize(("kind", "ahead"), [("exim", OFF_SECONDS), ("burst", -OFF_SECONDS)], ids=["exim-ahead", "burst-behind"])
def test_a_clock_that_is_off_and_is_set_loses_repeats_and_exceeds_nothing(
    engine: sa.Engine, tmp_path: Path, kind: str, running: Servers, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """The server sends; its clock is set by ten minutes, and its session killed; another one goes on, under which the clock is set back."""
    monkeypatch.setenv("MAIL_PIPELINES_SERVER__HEARTBEAT_SECONDS", "1")
    retries = {"first_retry_seconds": RETRY_SECONDS, "last_retry_seconds": RETRY_SECONDS}
    world = make_world(engine, tmp_path / "home", recipients=RECIPIENTS, kind=kind, linger_seconds=5, **retries)
    with_catcher = replace(world, kind="catcher")
    right, wrong = with_catcher.server("s1"), world.server("s2")
    mode = "burst" if kind == "burst" else "cutthrough"
    of_wrong = {"connections": 4, "per_second": PER_SECOND, "mode": mode}
    servers.set_limits(engine, "s1", "*", {"connections": 2, "per_second": OTHER_PER_SECOND})
    servers.set_limits(engine, "s1", "yahoo", {"connections": 2, "per_second": OTHER_YAHOO_PER_SECOND})
    servers.set_limits(engine, "s2", "*", of_wrong)
    servers.set_limits(engine, "s2", "yahoo", of_wrong | {"per_hour": YAHOO_PER_HOUR})
    for server in (right, wrong):
        world.grant(server)
    begin = time.time()
    not_before = int(begin) + 15
    late = (4, 8, 12)
    transact(engine, lambda connection: connection.execute(sa.update(Delivery).where(Delivery.contact_id.in_(late)).values(not_before=not_before)))
    world.hold(Kind.PROVIDER, "google")
    play = tmp_path / "play.toml"
    play.write_text(PLAY, encoding="utf-8")
    host = HostClock.of(Path(world.settings.server.run_folder).parent / "clock", ahead)
    running.start(with_catcher, right, play)
    running.start(world, wrong, play, clock=host)

    def arrived() -> int:
        """By way of the server whose clock is off."""
        return len(kept_by(world, "far-s2"))

    of_right, killed = SessionProcess(world, "s1", "run-1"), SessionProcess(world, "s2", "run-2", clock=host)
    wait_for(lambda: arrived() > 15 and open_claims_of(world, "run-2"), what="sending")
    host.set(-ahead)
    killed.kill()
    wait_for(lambda: not open_claims_of(world, "run-2"), what="settlement by a server whose clock was set since")
    before = arrived()
    world.release(Kind.PROVIDER, "google")
    last = SessionProcess(world, "s2", "run-3", clock=host)
    wait_for(lambda: arrived() > before + 15 and open_claims_of(world, "run-3"), what="sending")
    before = arrived()
    host.set(ahead)
    wait_for(lambda: not set(world.states()) - {State.DELIVERED, State.UNKNOWN}, what=lambda: f"the end: {world.states()}")
    end = time.time()
    for session in (of_right, last):
        session.wait()
    # To within half of a round trip, which on a busy machine may be long: one of the beats is quick.
    clock_errors = {"s1": "", "s2": f"the clock of s2 is 300 s {'ahead of' if ahead > 0 else 'behind'} the database's"}
    wait_for(lambda: clock_errors_of(world) == clock_errors, what=lambda: f"a beat that tells the clock: {clock_errors_of(world)}")

    assert arrived() > before + 5
    states = check_promise(world, RECIPIENTS)
    assert sum(state is State.UNKNOWN for state in states.values()) < RECIPIENTS * 0.1
    # Every process of Exim had either of the two times, and none the true one.
    for words in LINES[kind]:
        off_by = {round((stamp - (begin + end) / 2) / OFF_SECONDS) for stamp in times_of(world, "s2", words)}
        assert off_by == {1, -1}, words
    # No retry came before its time, nor did a row that was to wait.
    deferred = Counter(entry.token for entry in entries(world, "far-s2") if entry.outcome is not None and entry.outcome.kind is Ending.DEFERRED)
    assert deferred
    assert max(deferred.values()) == 1
    kept = {message.recipient: message for message in world.kept()}
    assert min(message.at for number in late if (message := kept.get(f"person{number}@small.test")) is not None) >= not_before
    # Limits.
    by_domain: defaultdict[str, list[float]] = defaultdict(list)
    for message in kept_by(world, "far-s2"):
        by_domain[message.recipient.partition("@")[2]].append(message.at)
    for times in by_domain.values():
        most = max(sum(start <= moment < start + WINDOW_SECONDS for moment in times) for start in times)
        assert most <= PER_SECOND * (WINDOW_SECONDS + LONGEST_REPLY_SECONDS) + 1
    with reading(engine) as connection:
        of_hours = (ProviderUsage.server_id == wrong.id, ProviderUsage.provider == "yahoo", ProviderUsage.window_seconds == 3600)
        hours = connection.execute(sa.select(ProviderUsage.used).where(*of_hours)).scalars().all()
        minutes = set(connection.execute(sa.select(CampaignMinute.minute).where(CampaignMinute.state == int(State.DELIVERED))).scalars())
    assert 0 < max(hours) <= YAHOO_PER_HOUR
    assert 0 < len(by_domain["yahoo.test"]) <= sum(hours)
    # What leaves the host is dated by the database.
    assert set(range(int(begin) // 60, int(end) // 60 + 1)) >= minutes
    dates = [email.utils.parsedate_to_datetime(email.message_from_bytes(message.data())["Date"]).timestamp() for message in kept.values()]
    assert begin - 2 <= min(dates) <= max(dates) <= end + 2
