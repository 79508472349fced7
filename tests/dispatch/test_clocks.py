"""The clock of one of two servers is five minutes off, ahead or behind: counted at the far end; and who says so."""

from __future__ import annotations

import ast
import datetime as dt
import email
import email.utils
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from mail_pipelines.commands import context
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import CampaignMinute, Claim, Delivery, ProviderUsage, State
from mail_pipelines.dispatch import clock, servers
from mail_pipelines.dispatch.catcher import log
from mail_pipelines.dispatch.catcher.store import Kept
from mail_pipelines.dispatch.claiming.refusals import Refusal, Verdict, answer
from mail_pipelines.dispatch.claiming.terms import Memory, Request, Sender
from mail_pipelines.dispatch.holds import Kind
from mail_pipelines.dispatch.journal import Entry, Position
from mail_pipelines.dispatch.journal import Kind as Ending
from mail_pipelines.doctor.central import check_clock
from mail_pipelines.doctor.finding import Finding
from mail_pipelines.doctor.fleet import check_servers
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.test_hold_commands import says
from tests.dispatch.world import Servers, World, make_world
from tests.parts.clock import HostClock
from tests.parts.processes import wait_for

ROOT = Path(__file__).resolve().parent.parent.parent
OFF_SECONDS = 300
# Of so many recipients a quarter is at each provider.
RECIPIENTS = 160
# A limit of the server whose clock is off.
YAHOO_PER_HOUR = 6
# A greylisted message that comes again before this is refused again.
GREYLIST_SECONDS = 2
RETRY_SECONDS = 4
PLAY = f"""
[[rule]]
domains = ["yahoo.test"]
reply_seconds = [0.0, 0.05]

[[rule]]
domains = ["*"]
reply_seconds = [0.0, 0.05]
greylist_percent = 30
greylist_seconds = {GREYLIST_SECONDS}
"""

# Where the send path reads the clock of its host, which may be off: nothing of it leaves the host, but for what people read.
OF_THE_HOST = {
    "dispatch/archive.py": "how long ago a piece was shipped, and the second in its name: a recovery allows for an hour",
    "dispatch/catcher/log.py": "the stamp of a line: a recovery allows for an hour",
    "dispatch/catcher/server.py": "how a destination plays",
    "dispatch/catcher/store.py": "when a message came",
    "dispatch/clock.py": "to compare it with the database's",
    "dispatch/exim/instance.py": "the age of a file",
    "dispatch/last_error.py": "when something failed, for people",
    "dispatch/permit.py": "when a permit ends that the mail server of the same host looks at",
    "dispatch/recovery/reading.py": "the age of a file",
    "dispatch/settler.py": "the age of a file",
}


def entries(world: World, key: str) -> list[Entry]:
    """The journal of a server."""
    return [entry for line in world.folders(key).journal.read_bytes().splitlines() if (entry := log.parse(line)) is not None]


def asked_in_vain(world: World, key: str) -> int:
    """How often a session of a server asked for rows and got none: it greets for each claim, and few of them are opened."""
    greeted = {int(entry.mark.partition(".")[0][1:]) for entry in entries(world, key) if entry.mark}
    with reading(world.engine) as connection:
        return len(greeted.difference(connection.execute(sa.select(Claim.id)).scalars()))


def kept_by(world: World, key: str) -> list[Kept]:
    return [message for message in world.kept() if Path(message.file).parent.name == key]


def open_claims_of(world: World, run_id: str) -> int:
    return world.open_claims(run_id)


@pytest.mark.server
@pytest.mark.crosswise
@pytest.mark.parametrize("ahead", [OFF_SECONDS, -OFF_SECONDS], ids=["ahead", "behind"])
def test_a_clock_that_is_off_loses_repeats_and_exceeds_nothing(
    engine: sa.Engine, tmp_path: Path, running: Servers, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    monkeypatch.setenv("MAIL_PIPELINES_SERVER__HEARTBEAT_SECONDS", "1")
    retries = {"first_retry_seconds": RETRY_SECONDS, "last_retry_seconds": RETRY_SECONDS}
    world = make_world(engine, tmp_path / "home", recipients=RECIPIENTS, linger_seconds=10, **retries)
    right, wrong = world.server("s1", connections=2, per_second=8.0), world.server("s2", connections=2, per_second=8.0)
    servers.set_limits(engine, "s2", "yahoo", {"connections": 2, "per_second": 8.0, "per_hour": YAHOO_PER_HOUR})
    for server in (right, wrong):
        world.grant(server)
    begin = time.time()
    not_before = int(begin) + 8
    late = (4, 8, 12)
    transact(engine, lambda connection: connection.execute(sa.update(Delivery).where(Delivery.contact_id.in_(late)).values(not_before=not_before)))
    world.hold(Kind.PROVIDER, "google")
    play = tmp_path / "play.toml"
    play.write_text(PLAY, encoding="utf-8")
    running.start(world, right, play)
    clock_of_s2 = HostClock.of(tmp_path / "clock", ahead)
    running.start(world, wrong, play, clock=clock_of_s2)
    sessions = [SessionProcess(world, "s1", "run-1"), SessionProcess(world, "s2", "run-2", clock=clock_of_s2)]
    wait_for(lambda: len(kept_by(world, "s2")) > 8 and open_claims_of(world, "run-2"), what="sending")
    sessions[1].kill()
    wait_for(lambda: not open_claims_of(world, "run-2"), what="settlement by the server whose clock is off")
    sessions[1] = SessionProcess(world, "s2", "run-3", clock=clock_of_s2)
    world.release(Kind.PROVIDER, "google")
    wait_for(lambda: world.states() == {State.DELIVERED: RECIPIENTS}, what=lambda: f"the end: {world.states()}")
    end = time.time()
    for session in sessions:
        session.wait()

    assert world.copies() == dict.fromkeys(range(1, RECIPIENTS + 1), 1)
    world.check_counters()
    for key in ("s1", "s2"):
        # None came back before its time, nor sent itself another one to do so.
        deferred = Counter(entry.token for entry in entries(world, key) if entry.outcome is not None and entry.outcome.kind is Ending.DEFERRED)
        assert deferred
        assert max(deferred.values()) == 1
    came = {message.recipient: message.at - (ahead if message in kept_by(world, "s2") else 0) for message in world.kept()}
    late_ones = [came[f"person{number}@small.test"] for number in late]
    assert min(late_ones) >= not_before
    with reading(engine) as connection:
        of_hours = (ProviderUsage.server_id == wrong.id, ProviderUsage.provider == "yahoo", ProviderUsage.window_seconds == 3600)
        hours = connection.execute(sa.select(ProviderUsage.used).where(*of_hours)).scalars().all()
        minutes = set(connection.execute(sa.select(CampaignMinute.minute).where(CampaignMinute.state == int(State.DELIVERED))).scalars())
        fleet = {server.key: server for server in servers.all_servers(connection)}
    assert 0 < max(hours) <= YAHOO_PER_HOUR
    assert sum(message.recipient.endswith("@yahoo.test") for message in kept_by(world, "s2")) <= sum(hours)
    assert set(range(int(begin) // 60, int(end) // 60 + 1)) >= minutes
    dates = [email.utils.parsedate_to_datetime(email.message_from_bytes(message.data())["Date"]).timestamp() for message in world.kept()]
    assert begin - 2 <= min(dates) <= max(dates) <= end + 2

    assert fleet["s1"].clock_error == ""
    way = "ahead of" if ahead > 0 else "behind"
    told = Finding("clock", f"the clock of s2 is 300 s {way} the database's", clock.REMEDY)
    # To the second, by the next beat at which the database did not keep the server waiting for one.
    wait_for(lambda: told in list(check_servers(engine, 60)), what=lambda: f"the clock of s2: {list(check_servers(engine, 60))}")


@pytest.mark.server
@pytest.mark.crosswise
def test_a_clock_that_is_ahead_asks_no_more_often(engine: sa.Engine, tmp_path: Path, running: Servers) -> None:
    """It is told to wait for five seconds, which is too long for its session."""
    world = make_world(engine, tmp_path / "home", recipients=4, domains=("google.test",), linger_seconds=2)
    server = world.server()
    world.grant(server)
    world.hold(Kind.PROVIDER, "google")
    play = tmp_path / "play.toml"
    play.write_text(PLAY, encoding="utf-8")
    clock_of_s1 = HostClock.of(tmp_path / "clock", OFF_SECONDS)
    running.start(world, server, play, clock=clock_of_s1)
    assert SessionProcess(world, "s1", "run-1", clock=clock_of_s1).wait() == "google is held: look"
    assert asked_in_vain(world, "s1") == 1


def test_the_send_path_reads_the_hosts_clock_only_for_what_stays_there() -> None:
    package = ROOT / "mail_pipelines"
    found = set()
    for path in (path for name in ("capacity", "delivery", "dispatch", "messages") for path in (package / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "time.time_ns", "dt.datetime.now", "dt.datetime.today", "dt.date.today"):
                found.add(path.relative_to(package).as_posix())
    assert found == set(OF_THE_HOST)


@pytest.mark.parametrize(
    ("refusal", "seconds"),
    [
        (Refusal(Verdict.NO_GRANT, dt.datetime(2026, 5, 4, 12, 14, 50, tzinfo=dt.UTC)), 10),
        (Refusal(Verdict.USED_UP, dt.datetime(2026, 5, 4, 12, 59, 30, tzinfo=dt.UTC), cap=5, window_seconds=3600), 30),
        (Refusal(Verdict.PROVIDER_HELD, dt.datetime(2026, 5, 4, 12, tzinfo=dt.UTC), "google is held"), 5),
        (Refusal(Verdict.NOTHING_DUE, dt.datetime(2026, 5, 4, 12, tzinfo=dt.UTC)), None),
    ],
)
def test_how_long_a_refused_claim_waits_is_told_by_the_databases_clock(refusal: Refusal, seconds: float | None) -> None:
    request = Request(Sender(1, "s1", "incarnation", "boot", "run-1"), Memory("generation"), 1, 1, 0, "google", 10, Position(1, 0), 30)
    assert answer(refusal, request).retry_seconds == seconds


@pytest.mark.parametrize(("ahead", "words"), [(300.2, "300 s ahead of the database's"), (-31.0, "31 s behind the database's")])
def test_a_clock_that_is_off_is_named_wherever_somebody_looks(engine: sa.Engine, tmp_path: Path, ahead: float, words: str) -> None:
    context.settings.cache_clear()
    world = make_world(engine, tmp_path / "home", recipients=4)
    world.server()
    world.set_server("s1", heartbeat_at=dt.datetime.now(dt.UTC), health={"clock_ahead": 4.0})
    assert "(clock is off)" not in says("server", "list")
    assert "clock 4 s ahead of the database's\n" in says("server", "show", "s1").replace(" \n", "\n")
    assert list(check_servers(engine, 60)) == []
    world.set_server("s1", health={"clock_ahead": ahead})
    assert "(clock is off)" in says("server", "list")
    assert f"clock {words}: let NTP set it" in says("server", "show", "s1")
    assert list(check_servers(engine, 60)) == [Finding("clock", f"the clock of s1 is {words}", clock.REMEDY)]


@pytest.mark.parametrize(("ahead", "problems"), [(0, []), (300, ["the clock of this host is 300 s ahead of the database's"])])
def test_doctor_looks_at_the_clock_of_its_own_host(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, ahead: float, problems: list[str]) -> None:
    monkeypatch.setattr(clock, "time", SimpleNamespace(time=lambda: time.time() + ahead))
    with reading(engine) as connection:
        assert [finding.problem for finding in check_clock(connection)] == problems
