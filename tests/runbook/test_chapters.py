"""Each chapter of the runbook, typed at an installation that is broken in that way: afterwards it is well, by what arrived and by `doctor`.

MariaDB where the chapter is about the database or its accounts, else SQLite.
"""

from __future__ import annotations

import datetime as dt
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines import __version__, config
from mail_pipelines.capacity import allotments, health
from mail_pipelines.database.engine import create_engine, database_now, reading, transact
from mail_pipelines.database.models import Server, State
from mail_pipelines.delivery.recording import Result, record
from mail_pipelines.dispatch import accounts, journal, servers
from mail_pipelines.dispatch.claims import OpenClaim
from mail_pipelines.domains import store
from mail_pipelines.domains.domain import Names
from mail_pipelines.domains.records import dkim_record
from mail_pipelines.domains.rotation import equip
from mail_pipelines.domains.signing import sending_as
from mail_pipelines.inbound.folders import InboundFolders
from mail_pipelines.provisioning import block_lists, listing, trial
from mail_pipelines.runbook import Chapter
from tests.dispatch.exim.test_log_disk import log_disk
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.test_breakers import ACCEPTS, REFUSAL, restart
from tests.dispatch.test_crashes import check_promise, finish
from tests.dispatch.world import Running, Servers, World, write_play
from tests.inbound.test_forged import REPORTS, Theft
from tests.parts.backups import dump
from tests.parts.dns import Zone, serving
from tests.parts.processes import stop, wait_for
from tests.runbook.conftest import Daemon, wrong_with_servers
from tests.runbook.document import chapters
from tests.runbook.operator import Operator, started

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]
ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
ON_MARIADB = pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)
NOW = dt.datetime.now(dt.UTC)


TESTED: set[Chapter] = set()
Opens = Callable[..., Operator]


def of(chapter: Chapter) -> pytest.MarkDecorator:
    """The chapter that a test goes through."""
    TESTED.add(chapter)
    return pytest.mark.parametrize("chapter", [chapter])


def test_each_chapter_has_a_test() -> None:
    assert list(chapters()) == [chapter.value for chapter in Chapter]
    assert set(Chapter) == TESTED


def beats(world: World, *keys: str, **told_besides: object) -> None:
    """The heartbeat of servers whose host is elsewhere, which is good for some minutes: of these, or all."""
    os.environ["MAIL_PIPELINES_SERVER__HEARTBEAT_SECONDS"] = "60"

    def work(connection: sa.Connection) -> None:
        told = {"release": __version__, "free_mb": 90_000, "clock_ahead": 0.0, **told_besides}
        chosen = Server.key.in_(keys) if keys else sa.true()
        connection.execute(sa.update(Server).where(chosen).values(heartbeat_at=database_now(connection), health=told))

    transact(world.engine, work)


@of(Chapter.BLOCKED)
@ON_SQLITE
# Some have to be left when the breaker, which is judged every few seconds, has opened.
@pytest.mark.parametrize("world", [600], indirect=True)
def test_a_provider_that_blocked_a_server_takes_its_mail_again(opens: Opens, world: World, daemon: Daemon, running: Servers, tmp_path: Path) -> None:
    server = world.server(connections=4, per_second=200.0)
    servers.set_limits(world.engine, None, "microsoft", {"connections": 2, "per_second": 10.0})
    play = write_play(tmp_path / "play.toml", refuse_percent=100, refusals=[REFUSAL], domains=["microsoft.test"], reply_seconds=[0.01, 0.02])
    play.write_text(play.read_text() + ACCEPTS)
    catcher = running.start(world, server, play)
    run = SessionProcess(world, "s1", "blocked")
    wait_for(lambda: any("has stopped sending" in problem for problem in wrong_with_servers()), what="the breaker")
    run.wait()

    daemon.beat()
    operator = opens({"SERVER": "s1", "PROVIDER": "microsoft"})
    operator.types()
    operator.sees()
    operator.types()
    play.write_text(ACCEPTS)
    restart(catcher)
    operator.types()
    operator.sees()

    def taken() -> bool:
        """Sessions begin as the sensor has them begin, when rows that were refused are due."""
        SessionProcess(world, "s1", "trial").wait()
        return not wrong_with_servers()

    wait_for(taken, seconds=300, what=lambda: f"the end of the block, instead of {wrong_with_servers()},")
    finish(world, catcher)
    daemon.beat()
    operator.types()
    operator.sees()
    states = world.states()
    assert set(states) == {State.DELIVERED, State.BOUNCED}
    assert states[State.DELIVERED] == len(world.copies()) > states[State.BOUNCED]


@of(Chapter.LISTED)
@ON_SQLITE
def test_a_listed_server_is_drained_and_comes_back(opens: Opens, world: World, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host is elsewhere: its heartbeats are the test's, and so is the test message that it sent within the hour."""
    server, lists, address = world.server(), block_lists.block_lists(), "192.0.2.9"
    world.set_server("s1", kind="exim")
    greets = {"hostname": "mail.example.test", "addresses": [address], "version": "Exim 4.96"}
    # Of few servers none is taken out of service by itself: it could be what all of them send.
    others = [world.server(f"s{number}").key for number in range(2, 5)]

    def all_beat() -> None:
        beats(world, *others)
        beats(world, "s1", **greets)

    all_beat()
    world.grant(server)
    claim = world.claim(server, limit=1)
    assert isinstance(claim, OpenClaim)
    domain = store.add(world.engine, Names.of("shop.test"), world.settings.token_key(), NOW)
    with serving(Zone()) as zone:
        for name, value in {"DNS__SERVERS": zone.address, "DNS__TIMEOUT_SECONDS": "60", "DNS__BLOCK_LIST_HOURS": "6"}.items():
            monkeypatch.setenv(f"MAIL_PIPELINES_{name}", value)
        listed = f"9.2.0.192.{lists[0].zone}"
        zone.publish(
            f"mail.example.test. 60 IN A {address}",
            "9.2.0.192.in-addr.arpa. 60 IN PTR mail.example.test.",
            f'bounces.shop.test. 60 IN TXT "v=spf1 ip4:{address} ~all"',
            dkim_record("shop.test", domain.keys[0]).zone_line(),
            *(f"2.0.0.127.{a_list.zone}. 60 IN A 127.0.0.2" for a_list in lists),
            f"{listed}. 60 IN A 127.0.0.4",
        )
        with reading(world.engine) as connection:
            fleet = servers.all_servers(connection)
            sending = sending_as(connection, "shop.test", server.id, world.settings.token_key())
        assert sending is not None
        message = trial.compose("shop.test", sending, server, world.settings.token_key(), dt.datetime.now(dt.UTC))
        inbox = InboundFolders.of(config.load().inbound).mail / "bounces/new"
        inbox.mkdir(parents=True)
        (inbox / "1").write_bytes(message.data)
        # As the sensor `server_health` does, which asks again soon where a list that matters has a server, and then takes that out of service.
        now, first, again = dt.datetime.now(dt.UTC), dt.timedelta(minutes=40), dt.timedelta(minutes=20)
        for ago in (first, again):
            listing.look(world.engine, config.load().dns, fleet, now - ago)
        assert health.look(world.engine, now - again) == []
        (said,) = health.look(world.engine, now)
        assert said.startswith("server s1 is drained: ")

        all_beat()
        daemon.beat()
        operator = opens({"SERVER": "s1"})
        operator.types()
        operator.sees()
        results = [Result(claim.rows[0].contact_id, 0, State.DELIVERED, 250)]
        transact(world.engine, lambda connection: record(connection, claim.ref, results, claim_state="open"))
        operator.types()
        operator.sees()
        assert not isinstance(world.claim(server, limit=1), OpenClaim)
        zone.withdraw(listed, "A")
        operator.types()
        operator.sees()
        all_beat()
        daemon.beat()
        operator.types()
        operator.sees()
        assert health.look(world.engine, dt.datetime.now(dt.UTC) + health.LOOK_EVERY) == []
        # What was granted to it had been taken back.
        allotments.fill(world.engine, 60)
        assert isinstance(world.claim(server, limit=1), OpenClaim)


@of(Chapter.WRONG_CAMPAIGN)
@ON_SQLITE
@pytest.mark.parametrize("world", [240], indirect=True)
def test_nothing_more_leaves_of_a_wrong_campaign(opens: Opens, world: World, daemon: Daemon, running: Servers, tmp_path: Path) -> None:
    # Most of them are left when somebody notices, on a busy machine as well.
    server = world.server(connections=4, per_second=2.0)
    catcher = running.start(world, server, write_play(tmp_path / "play.toml"))
    run = SessionProcess(world, "s1", "wrong")
    wait_for(lambda: len(world.kept()) > 10, what="sending")
    operator = opens({"CAMPAIGN": world.campaign_key})
    operator.types()
    held_at = time.time()
    operator.sees()
    run.wait()
    assert [message for message in world.kept() if message.at > held_at + 5] == []
    gone = len(world.kept())
    assert "held" in SessionProcess(world, "s1", "again").wait()
    daemon.beat()
    operator.types()
    operator.sees()
    finish(world, catcher)
    assert len(world.kept()) == gone < 240
    assert world.states() == {State.DELIVERED: gone, State.CANCELLED: 240 - gone}


def starts(catcher: Running) -> None:
    """As systemd does, again and again: a heartbeat that came back with the backup may be too young for another process to speak for the server."""

    def attempt() -> bool:
        try:
            catcher.start()
        except AssertionError as error:
            if "another process speaks for server" not in str(error):
                raise
            return False
        return True

    wait_for(attempt, what="the start of the mail server")


@of(Chapter.RESTORED)
@ON_MARIADB
@pytest.mark.parametrize("world", [240], indirect=True)
def test_after_a_restore_nobody_is_mailed_twice_and_nobody_forgotten(
    opens: Opens, world: World, daemon: Daemon, running: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Enough are left after the backup, on a busy machine as well.
    server = world.server(connections=4, per_second=2.0)
    catcher = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.2]))
    sessions = [SessionProcess(world, "s1", "first")]
    wait_for(lambda: len(world.kept()) > 20, what="sending")
    backup = tmp_path / "backup.sql"
    dump(world.engine, backup)
    at_backup, beat_at_backup = len(world.kept()), servers.last_beat(world.folders("s1"))
    assert beat_at_backup is not None
    wait_for(lambda: len(world.kept()) > at_backup + 60, what="sending after the backup")
    # A server process knows by its beats that the database went back, a session also by its claims.
    wait_for(lambda: (servers.last_beat(world.folders("s1")) or beat_at_backup) > beat_at_backup, what="a beat after the backup")

    def works() -> None:
        world.limit(per_second=200.0)
        sessions.append(SessionProcess(world, "s1", "after"))

    units = {
        "mail-pipelines-exim": (lambda: starts(catcher), catcher.stop),
        "mail-pipelines-worker": (works, lambda: [end(session) for session in sessions]),
    }
    names = {"SERVER": "s1", "CAMPAIGN": world.campaign_key, "DATABASE": str(world.engine.url.database), "BACKUP": str(backup)}
    operator = opens(names, units)
    client = tmp_path / ".my.cnf"
    client.write_text(f"[client]\nhost=127.0.0.1\nport={world.engine.url.port}\nuser=root\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    operator.types()
    mailed = world.copies()
    operator.types()
    assert len(mailed) > sum(count for state, count in world.states().items() if state is State.DELIVERED) + 40
    # A server that somebody starts now says so, and ends.
    too_early = subprocess.run([sys.executable, "-m", "mail_pipelines", "catcher", "run", "s1"], capture_output=True, text=True, timeout=120)
    assert too_early.returncode == 1
    operator.sees(too_early.stderr)
    recovering = operator.types_and_waits()
    try:
        assert recovering.stdout is not None
        operator.sees(recovering.stdout.readline())
        operator.types()
        printed, _ = recovering.communicate(timeout=120)
    finally:
        stop(recovering)
    assert recovering.returncode == 0, printed
    operator.sees(printed)
    assert world.copies() == mailed
    daemon.beat()
    operator.types()
    operator.sees()
    sessions[-1].process.join(120)
    finish(world, catcher)
    states = check_promise(world, 240)
    assert sum(state is State.UNKNOWN for state in states.values()) <= 8


def end(session: SessionProcess) -> None:
    """As a worker ends its sessions."""
    if session.process.is_alive():
        session.signal(signal.SIGTERM)
        session.process.join(120)


@of(Chapter.STOLEN)
@ON_MARIADB
@pytest.mark.parametrize("world", [41], indirect=True)
def test_a_stolen_server_gets_nothing_more_and_signs_nothing_that_counts(opens: Opens, world: World, daemon: Daemon, running: Servers, tmp_path: Path) -> None:
    fleet = [world.server(key) for key in ("s1", "s2")]
    catcher = running.start(world, fleet[1], write_play(tmp_path / "play.toml"))
    given = accounts.give(world.engine, "s1")
    domain = store.add(world.engine, Names.of("shop.test"), world.settings.token_key(), NOW)
    assert domain.names.domain == "shop.test"
    equip(world.engine, world.settings, fleet[0].id, NOW, allow_unverified=True)
    mailed = []
    for server in fleet:
        world.grant(server)
        claim = world.claim(server, limit=4)
        assert isinstance(claim, OpenClaim)
        mailed.append([row.contact_id for row in claim.rows])
        # The stolen one has in hand what it has claimed.
        if server.key == "s2":
            results = [Result(number, 0, State.DELIVERED, 250) for number in mailed[-1]]
            transact(world.engine, lambda connection, ref=claim.ref, results=results: record(connection, ref, results, claim_state="open"))  # type: ignore[misc]
    theft = Theft(world, *fleet, *mailed)
    thief = create_engine(given.url, given.password)
    with thief.connect() as connection:
        assert connection.exec_driver_sql("SELECT COUNT(*) FROM claims").scalar_one() == 1

        operator = opens({"SERVER": "s1", "CAMPAIGN": world.campaign_key})
        operator.types()
        operator.sees()
        daemon.beat()
        operator.types()
        operator.sees()

        with pytest.raises(sa.exc.DBAPIError):
            connection.exec_driver_sql("SELECT COUNT(*) FROM claims")
    thief.dispose()
    with pytest.raises(sa.exc.DBAPIError, match="denied"), thief.connect():
        pass
    assert not isinstance(world.claim(fleet[0], limit=1), OpenClaim)
    before = theft.follows()
    forged = [report(theft.token(victim)) for victim in (*theft.others, 41) for report in REPORTS]
    assert theft.read(*forged) == {"forged": len(forged)}
    assert theft.follows() == before
    finish(world, catcher)
    assert world.states() == {State.UNKNOWN: 4, State.DELIVERED: 37}
    assert set(world.copies()) == set(range(1, 42)) - set(theft.own) - set(theft.others)
    with world.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {world.engine.url.database}_servers")


@of(Chapter.DISK_FULL)
@ON_SQLITE
def test_a_server_sends_again_when_its_disk_has_room(opens: Opens, world: World, daemon: Daemon, running: Servers, tmp_path: Path) -> None:
    folder = world.folders("s1").log
    with log_disk(folder):
        server = world.server(connections=4, per_second=200.0)
        catcher = running.start(world, server, write_play(tmp_path / "play.toml"))
        ballast = folder / "archive.tar"
        with ballast.open("wb", buffering=0) as file:
            while (free := shutil.disk_usage(folder).free - ((journal.MIN_FREE_MB - 20) << 20)) > 0:
                file.write(bytes(min(free + 4096, 1 << 20)))
        assert "the log disk of s1" in SessionProcess(world, "s1", "full").wait()
        wait_for(lambda: any("log disk" in problem for problem in wrong_with_servers()), what="a heartbeat that tells")
        assert world.kept() == []
        daemon.beat()
        operator = opens({"SERVER": "s1", "FOLDER": str(folder), "FILE": str(ballast)})
        operator.types()
        operator.sees()
        assert str(ballast) in operator.types()
        operator.types()
        wait_for(lambda: not wrong_with_servers(), what="a heartbeat that tells of the room")
        operator.types()
        operator.sees()
        finish(world, catcher)
        assert world.states() == {State.DELIVERED: 120}
        assert len(world.copies()) == 120


@of(Chapter.DAEMON_DEAD)
@ON_SQLITE
def test_a_dead_daemon_beats_again(opens: Opens, world: World, daemon: Daemon) -> None:
    world.server()
    # Its runs are none of this test's.
    world.set_campaign(state="paused")
    beats(world)
    # It was killed an hour ago.
    daemon.beat(3600)
    living: list[subprocess.Popen[bytes]] = []

    def kill() -> None:
        for process in living:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    operator = opens({}, {"mail-pipelines-daemon": (lambda: living.append(started("mail-pipelines-daemon")), kill)})
    operator.types()
    operator.sees()
    try:
        operator.types()
        (process,) = living

        daemon.wait_for_beats(process)
        beats(world)
        operator.types()
        operator.sees()
    finally:
        kill()
