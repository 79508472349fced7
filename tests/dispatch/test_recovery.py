"""Failure scenario 4: a backup is restored, and rows that have been mailed since look unsent. Nobody is mailed twice, and nobody is lost."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from mail_pipelines.campaigns import states as campaign_states
from mail_pipelines.cli import app
from mail_pipelines.commands import context
from mail_pipelines.contacts.addresses import parse
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Campaign, Claim, Delivery, ProviderUsage, RecoveredOffer, Server, State, Suppression
from mail_pipelines.dispatch import audit, servers
from mail_pipelines.dispatch.claims import OpenClaim, WrongServer
from mail_pipelines.dispatch.files import DispatchError
from mail_pipelines.dispatch.recovery import applying, standing, steps
from mail_pipelines.dispatch.recovery import reading as reading_logs
from mail_pipelines.dispatch.recovery.standing import Part
from mail_pipelines.dispatch.servers import Heartbeat, WentBack
from mail_pipelines.dispatch.session import journal_of
from mail_pipelines.doctor.fleet import check_servers
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.test_audit import Log
from tests.dispatch.test_crashes import check_promise, states_by_contact
from tests.dispatch.world import Running, Servers, World, make_world, write_play
from tests.parts.backups import Backup
from tests.parts.processes import wait_for

NOW = dt.datetime.now(dt.UTC)


@pytest.fixture(autouse=True)
def _settings_of_this_test() -> Iterator[None]:
    context.settings.cache_clear()
    yield
    context.settings.cache_clear()


def recover(*words: str) -> str:
    done = CliRunner().invoke(app, ["recover", "--yes", *words])
    assert done.exit_code == 0, done.output
    return done.output


def resume(world: World) -> None:
    assert transact(world.engine, lambda connection: campaign_states.release(connection, world.campaign_id, "tester", NOW))


@pytest.mark.crosswise
@pytest.mark.server
@pytest.mark.timeout(560)
def test_after_a_restore_the_servers_stop_and_recover_completes_the_ledger(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """Two servers send at full speed, one of them is killed under way; then the database is that of an earlier moment."""
    recipients = 600
    # Several beats between backup and restore.
    os.environ["MAIL_PIPELINES_SERVER__HEARTBEAT_SECONDS"] = "1"
    world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind, reply_timeout_seconds=8)
    play = write_play(
        tmp_path / "play.toml", reply_seconds=[0.05, 0.3], refuse_percent=4, greylist_percent=6, greylist_seconds=2, silent_percent=1, silent_seconds=9
    )
    # So slow that there is enough left after the backup, however long that takes.
    fleet = [world.server(key, connections=6, per_second=6.0) for key in ("s1", "s2")]
    for server in fleet:
        # One that has not beaten for three seconds would be granted nothing.
        world.grant(server)
    started: list[Running] = [running.start(world, server, play) for server in fleet]
    first = [SessionProcess(world, server.key, f"first-{server.key}") for server in fleet]
    wait_for(lambda: len(world.kept()) > 50, what="sending")
    backup = Backup(engine)
    # What nobody had claimed by then, and the restored ledger will call unsent: how many are in hand differs from run to run.
    waiting = {row["contact_id"] for row in backup.rows(Delivery.__table__) if row["state"] in (State.PENDING, State.DEFERRED)}
    wait_for(lambda: len(waiting.intersection(world.copies())) > 60, seconds=60, what="sending")
    first[0].kill()
    wait_for(lambda: len(waiting.intersection(world.copies())) > 110, seconds=60, what="sending")

    backup.restore(engine)
    first[1].process.join()
    # The processes that speak for the servers end by themselves, as their next beat finds another past.
    for server in started:
        server.process.wait(120)
    mailed = world.copies()
    assert len(mailed.keys() & unsent(world)) > 100
    for server in fleet:
        with pytest.raises((WrongServer, AssertionError)):
            SessionProcess(world, server.key, f"no-{server.key}").wait()
        with pytest.raises(WentBack, match="mail-pipelines recover"):
            Heartbeat(engine, server.key, world.folders(server.key), 10).start()
    assert world.copies() == mailed

    world.limit(connections=6, per_second=60.0)
    states = recover_and_finish(world, started, recipients)
    # Of the killed session and of destinations that said nothing.
    assert Counter(states.values())[State.UNKNOWN] <= 45
    assert len(world.copies()) > recipients * 0.85


def unsent(world: World) -> list[int]:
    """Contacts to whom the ledger calls nothing sent and nothing in hand."""
    return [contact for contact, state in states_by_contact(world).items() if state in (State.PENDING, State.DEFERRED)]


def recover_and_finish(world: World, stopped: Sequence[Running], recipients: int) -> dict[int, State]:
    """What an operator does while nothing is sent: recover, start the servers, resume the campaign."""
    mailed = world.copies()
    output: list[str] = []
    operator = threading.Thread(target=lambda: output.append(recover()))
    operator.start()
    wait_for(lambda: _generation_is_new(world.engine), what="the recovery")
    for server in stopped:
        server.start()
    operator.join(250)
    assert output, "the recovery has not ended"
    assert "The ledger is complete" in output[0]
    states = states_by_contact(world)
    assert [contact for contact in world.copies() if states[contact] in (State.PENDING, State.DEFERRED)] == []
    world.check_counters()

    held = SessionProcess(world, stopped[0].server.key, "held").wait()
    assert "held" in held
    assert world.copies() == mailed
    resume(world)
    for number in range(20):
        runs = [SessionProcess(world, one.server.key, f"rest-{number}-{one.server.key}") for one in stopped]
        for run in runs:
            run.wait()
        if not set(states_by_contact(world).values()) & {State.PENDING, State.CLAIMED, State.DEFERRED}:
            break
    return check_promise(world, recipients)


def _generation_is_new(engine: sa.Engine) -> bool:
    with reading(engine) as connection:
        return standing.newest(connection) is not None


# --- the parts, by hand -----------------------------------------------------------------------------------------


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    world = make_world(engine, tmp_path / "home", recipients=20)
    world.kind = "exim"
    return world


@pytest.fixture
def server(world: World) -> servers.ServerInfo:
    found = world.server()
    log = world.folders(found.key)
    log.journal.touch()
    _beat(world, found)
    return found


def _beat(world: World, server: servers.ServerInfo) -> None:
    beaten = dt.datetime(2026, 11, 24, 12, 0, tzinfo=dt.UTC)
    transact(world.engine, lambda connection: connection.execute(sa.update(Server).where(Server.id == server.id).values(heartbeat_at=beaten)))
    servers.recall(world.engine, world.folders(server.key))


def take_part(world: World, server: servers.ServerInfo) -> bool:
    journal = journal_of(world.folders(server.key), server.kind)
    # Nobody writes any more.
    long_ago = time.time() - 10
    os.utime(journal.path, (long_ago, long_ago))
    return reading_logs.take_part(world.engine, world.settings, server, world.sender(server), journal)


def part(world: World, server: servers.ServerInfo) -> standing.ServerPart:
    with reading(world.engine) as connection:
        found = standing.newest(connection)
    assert found is not None
    known = found.of_server(server.id)
    assert known is not None
    return known


def row(world: World, contact_id: int) -> tuple[State, int, int | None, str | None]:
    with reading(world.engine) as connection:
        columns = (Delivery.state, Delivery.attempt, Delivery.code, Delivery.reason)
        found = connection.execute(sa.select(*columns).where(Delivery.campaign_id == world.campaign_id, Delivery.contact_id == contact_id)).one()
        return State(found.state), found.attempt, found.code, found.reason


def test_each_row_gets_the_end_of_its_newest_offer(world: World, server: servers.ServerInfo) -> None:
    log = Log(world, server)
    log.delivered(1)
    log.refused(2, "550 5.1.1 no such user person2@microsoft.test")
    log.refused(3, "451 4.2.0 later")
    log.refused(4, "451 4.2.0 later")
    log.intent(4, attempt=1)
    log.delivered(4, attempt=1)
    log.intent(5)
    log.intent(6)
    log.arrived(6)
    log.write(f"H=(c1.2) [127.0.0.1] p@x.test F=<b+{log.token(7)}@b.test> temporarily rejected after DATA: permit withdrawn c1.2")
    steps.begin(world.engine, NOW)
    assert not take_part(world, server)
    assert (part(world, server).part, part(world, server).offers) == (Part.READ, 7)
    with pytest.raises(WrongServer, match="mail-pipelines recover"):
        world.claim(server)
    report = steps.finish(world.engine, world.settings, NOW)
    assert report.ends == {"spring": Counter({State.DELIVERED: 2, State.BOUNCED: 1, State.DEFERRED: 2, State.UNKNOWN: 1})}
    assert row(world, 1) == (State.DELIVERED, 0, 250, None)
    assert row(world, 2) == (State.BOUNCED, 0, 550, "invalid_recipient")
    assert row(world, 3)[:3] == (State.DEFERRED, 1, 451)
    assert row(world, 4) == (State.DELIVERED, 1, 250, None)
    assert row(world, 5)[:2] == (State.UNKNOWN, 0)
    assert row(world, 6)[:2] == (State.DEFERRED, 1)
    assert row(world, 7)[:2] == (State.PENDING, 0)
    world.check_counters()
    with reading(world.engine) as connection:
        assert connection.execute(sa.select(Suppression.address_hash)).scalars().all() == [parse("person2@microsoft.test").hash]
        assert not connection.execute(sa.select(RecoveredOffer)).all()
    assert take_part(world, server)
    resume(world)
    world.grant(server)
    claimed = world.claim(server, provider="google", limit=500)
    assert isinstance(claimed, OpenClaim)
    assert not {found.contact_id for found in claimed.rows} & {1, 2, 4, 5}


def test_what_went_out_counts_against_todays_limits(world: World, server: servers.ServerInfo) -> None:
    log = Log(world, server)
    stamp = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M:%S.000")
    with log.path.open("a") as file:
        for contact_id in range(1, 21):
            words = f'>> p@x.test F=<b+{log.token(contact_id)}@b.test> R=r T=t H=mx [192.0.2.1] C="250 2.0.0 Ok" QT=1s'
            file.write(f"{stamp} [77] 1xVpQB-0005at-08 {words}\n")
    steps.begin(world.engine, NOW)
    take_part(world, server)
    now = dt.datetime.now(dt.UTC)
    steps.finish(world.engine, world.settings, now)
    with reading(world.engine) as connection:
        day = sa.select(sa.func.sum(ProviderUsage.used)).where(ProviderUsage.server_id == server.id, ProviderUsage.window_seconds == 86400)
        assert connection.execute(day).scalar_one() == 20


def test_an_offer_that_met_nobody_says_less_than_one_that_arrived(world: World) -> None:
    """The same attempt through two servers: the first could not be answered, the second delivered; in either order."""
    fleet = [world.server(key) for key in ("s1", "s2")]
    for server in fleet:
        world.folders(server.key).journal.touch()
        _beat(world, server)
    logs = [Log(world, server) for server in fleet]
    logs[0].intent(1)
    logs[1].delivered(1)
    logs[0].delivered(2)
    logs[1].intent(2)
    steps.begin(world.engine, NOW)
    for server in fleet:
        take_part(world, server)
    steps.finish(world.engine, world.settings, NOW)
    assert row(world, 1)[0] is State.DELIVERED
    assert row(world, 2)[0] is State.DELIVERED


def test_a_message_that_is_still_at_its_destination_is_waited_for(world: World, server: servers.ServerInfo) -> None:
    exim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    log = Log(world, server)
    log.intent(1, pid=exim.pid)
    steps.begin(world.engine, NOW)
    assert not take_part(world, server)
    assert part(world, server).part is Part.AWAITED
    with pytest.raises(DispatchError, match="the logs of s1 are not read yet"):
        steps.finish(world.engine, world.settings, NOW)
    log.delivered(1)
    exim.communicate(b"\n")
    assert not take_part(world, server)
    assert part(world, server).part is Part.READ
    steps.finish(world.engine, world.settings, NOW)
    assert row(world, 1)[0] is State.DELIVERED


@pytest.mark.parametrize("what", ["folder", "boot", "files", "lost"])
def test_where_a_log_lacks_something_no_row_stays_waiting(world: World, server: servers.ServerInfo, what: str) -> None:
    Log(world, server).delivered(1)
    folders = world.folders(server.key)
    if what == "boot":
        transact(world.engine, lambda connection: connection.execute(sa.update(Server).values(boot_id="another boot")))
    if what == "files":
        audit.run(world.engine, world.settings, server, journal_of(folders, server.kind), dt.datetime.now(dt.UTC) + dt.timedelta(seconds=10))
        shutil.copy(folders.journal, folders.log / "copy")
        folders.journal.unlink()
        (folders.log / "copy").rename(folders.journal)
    steps.begin(world.engine, NOW)
    if what == "folder":
        (folders.log / "incarnation").write_text("00000000-0000-0000-0000-000000000000")
        transact(world.engine, lambda connection: connection.execute(sa.update(Server).values(incarnation="00000000-0000-0000-0000-000000000000")))
    if what == "lost":
        assert steps.lose(world.engine, world.settings, server.key) == steps.Lost(0, Part.LOST)
    else:
        take_part(world, server)
        assert part(world, server).part is Part.INCOMPLETE
    report = steps.finish(world.engine, world.settings, NOW)
    assert report.uncovered == ["s1"]
    assert report.doubtful == (20 if what == "lost" else 19)
    assert set(world.states()) <= {State.UNKNOWN, State.DELIVERED}
    world.check_counters()


def test_claims_that_the_backup_has_open_are_settled_from_the_same_log(world: World, server: servers.ServerInfo) -> None:
    world.grant(server)
    opened = world.claim(server, limit=3)
    assert isinstance(opened, OpenClaim)
    contact_ids = [found.contact_id for found in opened.rows]
    log = Log(world, server)
    log.delivered(contact_ids[0])
    steps.begin(world.engine, NOW)
    take_part(world, server)
    with reading(world.engine) as connection:
        assert connection.execute(sa.select(Claim.state)).scalars().all() == ["closed"]
    steps.finish(world.engine, world.settings, NOW)
    assert row(world, contact_ids[0])[0] is State.DELIVERED


def test_a_campaign_that_the_backup_does_not_have_keeps_its_number(world: World, server: servers.ServerInfo) -> None:
    log = Log(world, server)
    log.campaign_id = 9
    log.delivered(1)
    log.delivered(2)
    steps.begin(world.engine, NOW)
    take_part(world, server)
    report = steps.finish(world.engine, world.settings, NOW)
    assert report.lost == {"lost-9": 2}
    with reading(world.engine) as connection:
        assert connection.execute(sa.select(Campaign.state).where(Campaign.id == 9)).scalar_one() == "cancelled"


def test_nobody_sends_before_the_recovery_is_finished(world: World, server: servers.ServerInfo) -> None:
    """Neither a server that has contributed, nor one that comes anew, nor one that has lost its memory."""
    steps.begin(world.engine, NOW)
    take_part(world, server)
    new = world.server("new")
    world.folders("new").journal.touch()
    for one in (server, new):
        world.grant(one)
        with pytest.raises(WrongServer, match="went back"):
            world.claim(one)
    assert not take_part(world, new)
    assert not take_part(world, new)
    assert part(world, new).part is Part.READ
    world.folders(server.key).memory.unlink()
    world.folders(server.key).heartbeat.touch()
    with pytest.raises(WrongServer, match="went back"):
        world.claim(server)
    steps.finish(world.engine, world.settings, NOW)
    with pytest.raises(WrongServer, match="went back"):
        world.claim(server)
    resume(world)
    for one in (server, new):
        assert take_part(world, one)
        assert isinstance(world.claim(one, limit=1), OpenClaim)


def test_a_killed_recovery_goes_on(world: World, server: servers.ServerInfo) -> None:
    log = Log(world, server)
    for contact_id in range(1, 11):
        log.delivered(contact_id)
    begun = steps.begin(world.engine, NOW)
    assert steps.begin(world.engine, NOW).generation == begun.generation
    assert "recovery" in {finding.check for finding in check_servers(world.engine, 10)}
    take_part(world, server)
    # Half of it was applied when the process was killed.
    applying.apply(world.engine, world.campaign_id, world.settings.sending, NOW)
    report = steps.finish(world.engine, world.settings, NOW)
    assert report.ends == {}
    assert world.states() == Counter({State.DELIVERED: 10, State.PENDING: 10})
    world.check_counters()


def test_an_audience_that_is_frozen_again_gets_what_was_mailed_before(world: World, server: servers.ServerInfo) -> None:
    """The backup is of a moment before the freeze; the logs say whom the campaign has reached since."""
    log = Log(world, server)
    log.delivered(1)
    log.refused(2, "451 4.2.0 later")
    world.set_campaign(state="scheduled", start_at=NOW - dt.timedelta(hours=3))
    loaded = Backup(world.engine)
    transact(world.engine, lambda connection: connection.execute(sa.delete(Delivery)))
    steps.begin(world.engine, NOW)
    take_part(world, server)
    assert steps.finish(world.engine, world.settings, NOW).ends == {}
    # What the freeze does: it loads the rows, then asks.
    loaded.restore_table(world.engine, Delivery.__table__)
    applying.catch_up(world.engine, world.campaign_id, NOW - dt.timedelta(hours=3), world.settings.sending, NOW)
    assert row(world, 1)[0] is State.DELIVERED
    assert row(world, 2)[:2] == (State.DEFERRED, 1)
    assert world.states()[State.PENDING] == 18
    world.check_counters()
