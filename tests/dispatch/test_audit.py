"""The audit of a server's log: what the ledger missed comes to light, once, and nothing else changes."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from unittest import mock

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from mail_pipelines.commands import context
from mail_pipelines.commands import server as commands
from mail_pipelines.contacts.addresses import parse
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Delivery, DeliveryEvent, State, Suppression, SyncState
from mail_pipelines.delivery import counters
from mail_pipelines.dispatch import audit, servers
from mail_pipelines.dispatch.audit import Audit
from mail_pipelines.dispatch.journal import Kind
from mail_pipelines.dispatch.session import Session, journal_of
from mail_pipelines.messages.tokens import DeliveryToken, sign_delivery
from tests.dispatch.world import Servers, World, make_world, write_play


def later() -> dt.datetime:
    """A moment at which nothing was written to a log for a while."""
    return dt.datetime.now(dt.UTC) + dt.timedelta(seconds=10)


def run(world: World, server: servers.ServerInfo) -> Audit:
    return audit.run(world.engine, world.settings, server, journal_of(world.folders(server.key), server.kind), later())


class Log:
    """Writes an Exim log by hand, for the rows of a world."""

    def __init__(self, world: World, server: servers.ServerInfo) -> None:
        self.path = world.folders(server.key).journal
        self.key = world.settings.token_key()
        self.campaign_id = world.campaign_id

    def token(self, contact_id: int, attempt: int = 0) -> str:
        return sign_delivery(DeliveryToken(self.campaign_id, contact_id, attempt), self.key)

    def write(self, *lines: str) -> None:
        with self.path.open("a") as file:
            file.writelines(f"2026-11-24 12:15:42.927 [77] 1xVpQB-0005at-08 {line}\n" for line in lines)

    def intent(self, contact_id: int, attempt: int = 0, pid: int = 99_999_999) -> None:
        self.write(f"INTENT {self.token(contact_id, attempt)} {pid}")

    def delivered(self, contact_id: int, attempt: int = 0, words: str = "250 2.0.0 Ok") -> None:
        self.write(f'>> p@x.test F=<b+{self.token(contact_id, attempt)}@b.test> R=r T=t H=mx [192.0.2.1] C="{words}" QT=1s')

    def refused(self, contact_id: int, words: str, attempt: int = 0) -> None:
        stage = "rejected" if words.startswith("5") else "tmp-reject from cutthrough"
        self.write(f'H=(c1.2) [127.0.0.1] p@x.test F=<b+{self.token(contact_id, attempt)}@b.test> {stage} after DATA: R=r T=t C="{words}"')

    def arrived(self, contact_id: int, attempt: int = 0) -> None:
        self.write(f"<= b+{self.token(contact_id, attempt)}@b.test H=(c1.2) [127.0.0.1] P=esmtp S=319")


def set_rows(world: World, contact_ids: list[int], state: State, **values: object) -> None:
    """Put pending rows into a state, with their counters."""

    def work(connection: sa.Connection) -> None:
        ours = (Delivery.campaign_id == world.campaign_id, Delivery.contact_id.in_(contact_ids))
        for row in connection.execute(sa.select(Delivery.shard, Delivery.provider, Delivery.state).where(*ours)).all():
            moves = {(row.shard, row.provider, State(row.state), ""): -1, (row.shard, row.provider, state, ""): 1}
            counters.add(connection, world.campaign_id, 0, moves, dt.datetime.now(dt.UTC))
        connection.execute(sa.update(Delivery).where(*ours).values(state=int(state), **values))

    transact(world.engine, work)


def row(world: World, contact_id: int) -> sa.Row[tuple[int, int, int | None, str | None, str | None]]:
    with reading(world.engine) as connection:
        columns = (Delivery.state, Delivery.attempt, Delivery.code, Delivery.enhanced, Delivery.reason)
        return connection.execute(sa.select(*columns).where(Delivery.campaign_id == world.campaign_id, Delivery.contact_id == contact_id)).one()


def events(world: World, contact_id: int) -> set[tuple[str, str | None, str | None]]:
    with reading(world.engine) as connection:
        columns = (DeliveryEvent.kind, DeliveryEvent.reason, DeliveryEvent.text)
        return {tuple(event) for event in connection.execute(sa.select(*columns).where(DeliveryEvent.contact_id == contact_id))}


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    world = make_world(engine, tmp_path / "home", recipients=12)
    world.kind = "exim"
    return world


@pytest.fixture
def server(world: World) -> servers.ServerInfo:
    return world.server()


def test_a_greylisting_ends_no_doubt(world: World, server: servers.ServerInfo) -> None:
    """It is no attempt, so an older one is about the same token as the offer that is in doubt."""
    log = Log(world, server)
    set_rows(world, [1], State.UNKNOWN, claim_id=7, server_id=server.id)
    log.refused(1, "451 4.7.1 Greylisting in action, please come back later")
    found = run(world, server)
    assert (found.resolved.total(), found.disagreeing.total()) == (0, 0)
    assert row(world, 1).state == State.UNKNOWN


def test_late_lines_end_the_doubt_and_reading_them_twice_changes_nothing(world: World, server: servers.ServerInfo) -> None:
    log = Log(world, server)
    set_rows(world, [1, 2, 3, 4, 5], State.UNKNOWN, claim_id=7, server_id=server.id)
    for contact_id in (1, 2, 3, 4, 5):
        log.intent(contact_id)
    first = run(world, server)
    assert (first.lines, first.resolved.total(), first.disagreeing.total()) == (5, 0, 0)
    log.delivered(1)
    log.refused(2, "550 5.1.1 no such user person2@microsoft.test")
    log.refused(3, "451 4.3.0 out of resources")
    log.arrived(4)
    found = run(world, server)
    assert found.resolved == {State.DELIVERED: 1, State.BOUNCED: 1, State.DEFERRED: 2}
    assert found.outcomes == {Kind.DELIVERED: 1, Kind.BOUNCED: 1, Kind.DEFERRED: 2}
    assert row(world, 1) == (State.DELIVERED, 0, 250, "2.0.0", None)
    assert row(world, 2) == (State.BOUNCED, 0, 550, "5.1.1", "invalid_recipient")
    assert row(world, 3) == (State.DEFERRED, 1, 451, "4.3.0", "transient")
    assert row(world, 5).state == State.UNKNOWN
    assert events(world, 1) == {("late_delivery", None, None)}
    assert events(world, 2) == {("late_refusal", "invalid_recipient", "no such user ***@microsoft.test")}
    with reading(world.engine) as connection:
        assert connection.execute(sa.select(Suppression.address_hash)).scalars().all() == [parse("person2@microsoft.test").hash]
    world.check_counters()

    transact(world.engine, lambda connection: connection.execute(sa.delete(SyncState).where(SyncState.source == audit.SOURCE)))
    again = run(world, server)
    assert again.lines == 9
    assert (again.resolved.total(), again.completed, again.disagreeing.total()) == (0, 0, 0)
    assert len(events(world, 2)) == 1
    world.check_counters()


def test_what_another_host_said_after_a_silence_ends_no_doubt(world: World, server: servers.ServerInfo) -> None:
    """In burst mode, where Exim goes on to the next mail exchanger; with all of it in one reading, and with the silence before it."""
    for contact_id in (1, 2):
        log = Log(world, server)
        set_rows(world, [contact_id], State.UNKNOWN, claim_id=7, server_id=server.id)
        log.write(f"<= b+{log.token(contact_id)}@b.test H=(c1.2.google) [127.0.0.1] P=esmtp S=319")
        log.intent(contact_id)
        log.write("H=mx1.x.test [192.0.2.1]: SMTP timeout after end of data")
        if contact_id == 1:
            run(world, server)
        log.write(
            "== p@x.test Q=google R=queued_to_mail_exchangers T=burst defer (-46) H=mx2.x.test [192.0.2.2]: "
            "SMTP error from remote mail server after initial connection: 421 4.7.0 busy"
        )
        found = run(world, server)
        assert (found.resolved.total(), found.unknown_forms, found.disagreeing.total()) == (0, 0, 0)
        assert row(world, contact_id).state == State.UNKNOWN


def test_an_older_attempt_changes_nothing_newer(world: World, server: servers.ServerInfo) -> None:
    log = Log(world, server)
    set_rows(world, [1, 2], State.UNKNOWN, attempt=1)
    log.refused(1, "451 4.3.0 out of resources")
    log.refused(2, "550 5.1.1 no such user")
    found = run(world, server)
    assert row(world, 1).state == row(world, 2).state == State.UNKNOWN
    assert found.disagreements == {"bounced in the log, unknown in the ledger": ["1/2/0"]}


def test_each_disagreement_is_named_by_ids(world: World, server: servers.ServerInfo) -> None:
    log = Log(world, server)
    set_rows(world, [1, 2], State.DELIVERED)
    set_rows(world, [3], State.BOUNCED)
    set_rows(world, [4], State.CLAIMED)
    set_rows(world, [5], State.CANCELLED)
    for contact_id in (1, 3, 4, 6, 999):
        log.delivered(contact_id)
    log.refused(2, "550 5.1.1 no such user")
    log.refused(5, "451 4.3.0 out of resources")
    log.refused(7, "451 4.3.0 out of resources")
    found = run(world, server)
    assert found.disagreements == {
        "delivered in the log, bounced in the ledger": ["1/3/0"],
        "delivered in the log, pending in the ledger": ["1/6/0"],
        "delivered in the log, no row in the ledger": ["1/999/0"],
        "bounced in the log, delivered in the ledger": ["1/2/0"],
        "deferred in the log, pending in the ledger": ["1/7/0"],
    }
    assert found.resolved.total() == 0


def test_a_bounce_recorded_without_the_destinations_words_gets_them(world: World, server: servers.ServerInfo) -> None:
    log = Log(world, server)
    set_rows(world, [1], State.BOUNCED, code=550, reason="unclassified")
    log.refused(1, "550 5.1.1 no such user")
    assert run(world, server).completed == 1
    assert row(world, 1) == (State.BOUNCED, 0, 550, "5.1.1", "invalid_recipient")
    assert events(world, 1) == {("bounced", "invalid_recipient", "no such user")}
    with reading(world.engine) as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(Suppression)).scalar_one() == 1
    log.refused(1, "550 5.1.1 no such user")
    assert run(world, server).completed == 0


def test_what_cannot_be_read_is_counted_and_kept_aside_once_with_its_place(world: World, server: servers.ServerInfo) -> None:
    log = Log(world, server)
    log.write("=> p@x.test F=<b+x@b.test> R=r", "a form of tomorrow")
    with log.path.open("ab") as file:
        file.write(b"\xfftorn\n")
    found = run(world, server)
    assert (found.alarms, found.unknown_forms, found.bad_lines) == (1, 1, 1)
    aside = log.path.with_name("set-aside.log")
    kept = [json.loads(line) for line in aside.read_text().splitlines()]
    assert [entry["why"] for entry in kept] == ["alarm", "unknown form", "bad"]
    inode, offset = kept[2]["place"].split(":")
    assert int(inode) == log.path.stat().st_ino
    assert log.path.read_bytes()[int(offset) :] == b"\xfftorn\n"
    transact(world.engine, lambda connection: connection.execute(sa.delete(SyncState)))
    run(world, server)
    assert len(aside.read_text().splitlines()) == 3


def test_alarms_stay_in_view(world: World, server: servers.ServerInfo) -> None:
    context.settings.cache_clear()
    log = Log(world, server)
    log.write("=> p@x.test F=<b+x@b.test> R=r")
    run(world, server)
    log.write("Completed")
    run(world, server)
    for words in (["list"], ["show", "s1"]):
        with mock.patch.object(context.console, "_width", 200):
            result = CliRunner().invoke(commands.app, words)
        assert result.exception is None
        assert "1, last found" in result.output, result.output
    assert "lines" in result.output


def test_a_server_without_new_lines_needs_no_audit(world: World, server: servers.ServerInfo) -> None:
    heart = servers.Heartbeat(world.engine, "s1", world.folders("s1"), 10)
    log = Log(world, server)

    def unread() -> bool:
        heart.start()
        with reading(world.engine) as connection:
            return audit.unread(servers.find(connection, "s1"), audit.standings(connection).get("s1"))

    assert not unread()
    log.write("Completed")
    assert unread()
    run(world, server)
    assert not unread()
    log.path.rename(log.path.with_name("main.log.1"))
    log.path.touch()
    run(world, server)
    assert not unread()
    log.write("Completed")
    assert unread()


def test_another_incarnation_is_read_from_its_beginning(world: World, server: servers.ServerInfo) -> None:
    log = Log(world, server)
    log.write("Completed", "Completed")
    assert run(world, server).lines == 2
    (log.path.parent / "incarnation").write_text("another")
    assert run(world, server).lines == 2


@pytest.mark.server
def test_log_and_ledger_agree_after_an_ordinary_session(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", recipients=200, kind=kind)
    server = world.server(connections=8)
    started = running.start(world, server, write_play(tmp_path / "play.toml", refuse_percent=20, greylist_percent=20, greylist_seconds=1))
    Session(engine, world.settings, server, world.campaign_id, world.campaign_key, 0, "run-1", journal_of(started.folders, server.kind)).run()
    found = run(world, server)
    states = world.states()
    assert found.disagreeing == {}
    assert (found.outcomes[Kind.DELIVERED], found.outcomes[Kind.BOUNCED]) == (states[State.DELIVERED], states[State.BOUNCED])
    assert sum(found.per_minute.values()) == found.outcomes.total() > 200
    assert (found.bad_lines, found.unknown_forms, found.alarms, found.foreign, found.gaps) == (0, 0, 0, 0, 0)


def test_what_somebody_else_was_recording_is_looked_at_again(world: World, server: servers.ServerInfo) -> None:
    """A line that came between a sender's look at the log and its recording."""
    log = Log(world, server)
    set_rows(world, [1, 2], State.CLAIMED)
    log.delivered(1)
    log.delivered(2)
    assert run(world, server).resolved.total() == 0
    set_rows(world, [1], State.UNKNOWN)
    set_rows(world, [2], State.DELIVERED)
    again = run(world, server)
    assert (again.lines, again.resolved, again.disagreeing.total()) == (0, {State.DELIVERED: 1}, 0)
    assert run(world, server).resolved.total() == 0
