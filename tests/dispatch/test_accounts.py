"""A dispatch server with its own database account: it can do all its work, and whoever steals it can do nothing else."""

from __future__ import annotations

import datetime as dt
import itertools
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from mail_pipelines import config
from mail_pipelines.commands import context
from mail_pipelines.commands import server as commands
from mail_pipelines.contacts import consent
from mail_pipelines.contacts.addresses import parse
from mail_pipelines.database import migrate
from mail_pipelines.database.boundary.rights import VIEWS
from mail_pipelines.database.engine import DatabaseUnreachable, create_engine, reading, transact
from mail_pipelines.database.models import Base, Campaign, Claim, Contact, Delivery, DkimKey, RecoveredOffer, Server, State, Suppression
from mail_pipelines.database.procedures import installation as procedures
from mail_pipelines.database.procedures.calling import call
from mail_pipelines.delivery.recording import Result, record
from mail_pipelines.dispatch import accounts, audit, claims, giving_way, servers, settlement, token_keys, windows
from mail_pipelines.dispatch.accounts import KeyHeld
from mail_pipelines.dispatch.claiming import wanted
from mail_pipelines.dispatch.claims import OpenClaim
from mail_pipelines.dispatch.giving_way import errand_for, waits_for_a_slot
from mail_pipelines.dispatch.journal import Position
from mail_pipelines.dispatch.recovery import standing
from mail_pipelines.dispatch.recovery.reading import take_part
from mail_pipelines.dispatch.recovery.standing import Part
from mail_pipelines.dispatch.session import Session, journal_of
from mail_pipelines.dispatch.settler import Settler
from mail_pipelines.dispatch.token_keys import InUse
from mail_pipelines.domains import store
from mail_pipelines.domains.domain import ALL_SERVERS, Names
from mail_pipelines.domains.keys import KeyNotOpened
from mail_pipelines.domains.signing import sending_as
from mail_pipelines.messages.keyring import derive
from tests.dispatch.test_audit import Log
from tests.dispatch.test_giving_way import URGENT, another_campaign, give_window, retries
from tests.dispatch.test_send_windows import open_windows
from tests.dispatch.world import Servers, World, make_world, write_play
from tests.parts.database_clock import DatabaseClock

pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]
NOW = dt.datetime.now(dt.UTC)
SECRET = b"a key for tests"


@dataclass
class Accounts:
    """A world whose servers have accounts: `world` is the centre's view of it."""

    world: World
    given: dict[str, accounts.Account] = field(default_factory=dict)
    _engines: list[sa.Engine] = field(default_factory=list)

    def give(self, key: str) -> sa.Engine:
        """The database as the server `key` sees it."""
        self.given[key] = accounts.give(self.world.engine, key)
        return self.connect(key)

    def connect(self, key: str) -> sa.Engine:
        self._engines.append(create_engine(self.given[key].url, self.given[key].password))
        return self._engines[-1]

    def close(self) -> None:
        for engine in self._engines:
            engine.dispose()
        with self.world.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for given in self.given.values():
                connection.exec_driver_sql("DROP USER IF EXISTS %s@'%%'", (sa.make_url(given.url).username,))
            connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {self.world.engine.url.database}_servers")


@pytest.fixture
def fleet(engine: sa.Engine, tmp_path: Path) -> Iterator[Accounts]:
    made = Accounts(make_world(engine, tmp_path / "home", recipients=80))
    yield made
    made.close()


@dataclass
class Theft:
    """The server s1 is stolen, of s1 and s2, which have both claimed rows of google. `rows` and `others`: what each has claimed."""

    fleet: Accounts
    engine: sa.Engine
    server: servers.ServerInfo
    other: servers.ServerInfo
    claimed: OpenClaim
    others: OpenClaim

    @property
    def world(self) -> World:
        return self.fleet.world

    def rows(self, query: str, *parameters: object) -> list[tuple[object, ...]]:
        with reading(self.engine) as connection:
            return [tuple(row) for row in connection.exec_driver_sql(query, parameters)]

    def changes(self, statement: str, *parameters: object) -> int:
        return transact(self.engine, lambda connection: connection.exec_driver_sql(statement, parameters).rowcount)

    def call(self, name: str, *arguments: object) -> list[list[tuple[object, ...]]]:
        return transact(self.engine, lambda connection: call(connection, name, arguments))


@pytest.fixture
def theft(fleet: Accounts) -> Theft:
    world = fleet.world
    stolen, other = world.server("s1"), world.server("s2")
    for server in (stolen, other):
        world.grant(server, 12)
    engine = fleet.give("s1")
    fleet.give("s2")
    mine, theirs = replace(world, engine=engine).claim(stolen, limit=5), replace(world, engine=fleet.connect("s2")).claim(other, limit=5)
    assert isinstance(mine, OpenClaim)
    assert isinstance(theirs, OpenClaim)
    return Theft(fleet, engine, stolen, other, mine, theirs)


# --- what a server needs --------------------------------------------------------------------------------------------


def test_a_server_does_errands_under_its_own_account(theft: Theft) -> None:
    ((run_id,),) = theft.rows("SELECT run_id FROM claims")
    retries(theft.world)
    with reading(theft.engine) as connection:
        found = errand_for(connection, theft.server, str(run_id), theft.world.campaign_id, slots=1, waits=False)
    assert found == (URGENT, "urgent", 0)


def test_a_server_gives_way_to_an_urgent_campaign_without_a_look_at_other_servers(theft: Theft) -> None:
    ((run_id,),) = theft.rows("SELECT run_id FROM claims")
    with reading(theft.engine) as connection:
        assert waits_for_a_slot(connection, theft.server, str(run_id), slots=1) is None
    another_campaign(theft.world, priority=3)
    with reading(theft.engine) as connection:
        assert waits_for_a_slot(connection, theft.server, str(run_id), slots=1) == "urgent"
    # Which hours it may be sent in is not the server's to know.
    give_window(theft.world)
    assert theft.rows("SELECT `key`, send_window FROM campaigns ORDER BY id") == [("spring", None), ("urgent", 1)]
    assert theft.rows("SELECT DISTINCT server_id FROM allotments") == [(theft.server.id,)]
    with pytest.raises(sa.exc.DBAPIError, match=r"(?i)denied"):
        theft.changes("UPDATE allotments SET granted = 1000000")


def test_a_server_sends_a_campaign_with_nothing_but_its_own_rights(fleet: Accounts, tmp_path: Path, running: Servers) -> None:
    world = fleet.world
    server = world.server(connections=2)
    world.grant(server)

    def hinder(connection: sa.Connection) -> None:
        consent.suppress(connection, [parse("person1@google.test").hash], reason="complaint", now=NOW)
        moved = parse("new@yahoo.test")
        values = {"email": moved.email, "address": moved.address, "address_hash": moved.hash, "domain": moved.domain, "provider": "yahoo"}
        connection.execute(sa.update(Contact).where(Contact.id == 5).values(values))
        connection.execute(sa.delete(Contact).where(Contact.id == 9))

    transact(world.engine, hinder)
    engine = fleet.give("s1")
    environ = {
        "MAIL_PIPELINES_DATABASE__URL": fleet.given["s1"].url,
        "MAIL_PIPELINES_DATABASE__PASSWORD": fleet.given["s1"].password,
        "MAIL_PIPELINES_SERVER": "s1",
        "MAIL_PIPELINES_SENDING__TOKEN_KEY": derive(SECRET, "s1").decode(),
    }
    with mock.patch.dict(os.environ, environ):
        running.start(world, server, write_play(tmp_path / "play.toml", refuse_percent=20, greylist_percent=30, greylist_seconds=1))
        own = replace(world, engine=engine, settings=config.load())
        journal = journal_of(own.folders("s1"), server.kind)
        report = Session(engine, own.settings, servers_seen_by(engine, "s1"), world.campaign_id, world.campaign_key, 0, "run-1", journal).run()
        Settler(engine, own.settings, server).round(dt.datetime.now(dt.UTC))
        found = audit.run(engine, own.settings, server, journal, dt.datetime.now(dt.UTC) + dt.timedelta(seconds=10))
    assert report.reason == "the shard is final"
    states = world.states()
    assert states[State.SUPPRESSED] == 2
    assert states[State.BOUNCED] > 0
    assert states[State.DELIVERED] + states[State.BOUNCED] == 78
    # By the tokens of what arrived, all of them under its own key.
    assert set(own.copies().values()) == {1}
    assert found.disagreeing == {}
    assert found.foreign == 0
    with reading(world.engine) as connection:
        suppressed = connection.execute(sa.select(sa.func.count()).where(Suppression.reason == "bounce")).scalar_one()
        centre_sees = servers.find(connection, "s1")
    assert suppressed == states[State.BOUNCED]
    assert centre_sees.heartbeat_at is not None
    assert token_keys.in_use(centre_sees, SECRET) is InUse.OWN
    assert world.open_claims() == 0
    world.check_counters()


def test_a_server_keeps_send_windows_and_gives_way_where_one_opens_with_nothing_but_its_own_rights(
    fleet: Accounts, tmp_path: Path, running: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody is greylisted at first, so its session waits. Another campaign's window has opened meanwhile, for rows that were put off."""
    monkeypatch.setattr(giving_way, "ROWS_TO_JOIN", 2)
    world = fleet.world
    server = world.server(connections=2)
    world.grant(server)
    open_windows(world, {"Europe/Berlin": ((-3600, 7200),), "": ((-7200, -60), (3600, 7200))})
    retries(world)
    give_window(world)
    engine = fleet.give("s1")
    running.start(world, server, write_play(tmp_path / "play.toml", greylist_percent=100, greylist_seconds=1))
    own = replace(world, engine=engine, settings=of_one_slot(world.settings))

    def session(run_id: str) -> str:
        journal = journal_of(own.folders("s1"), server.kind)
        return Session(engine, own.settings, servers_seen_by(engine, "s1"), world.campaign_id, world.campaign_key, 0, run_id, journal).run().reason

    assert session("run-1") == "campaign urgent waits for a slot of this server"
    transact(world.engine, lambda connection: connection.execute(sa.update(Campaign).where(Campaign.id == URGENT).values(state="paused")))
    session("run-2")
    with reading(world.engine) as connection:
        put_off = connection.execute(sa.select(sa.func.count()).where(Delivery.reason == windows.WAITS)).scalar_one()
    assert world.states() == {State.DELIVERED: 40, State.DEFERRED: put_off}
    assert put_off == 40
    world.check_counters()


def of_one_slot(settings: config.Settings) -> config.Settings:
    """The settings of s1 itself, which runs one session at once."""
    return settings.model_copy(update={"this_server": "s1", "server": settings.server.model_copy(update={"slots": 1})})


def servers_seen_by(engine: sa.Engine, key: str) -> servers.ServerInfo:
    migrate.require_schema(engine)
    with reading(engine) as connection:
        return servers.find(connection, key)


def test_what_was_not_offered_goes_back_and_its_debit_too(theft: Theft) -> None:
    """An abandoned claim is settled by the server's account: nothing is in its log, so all is released."""
    world = theft.world
    before = world.usage(theft.server, "google")
    # In the slot of the claim: of a debit in one that is over nothing is given back.
    DatabaseClock(theft.engine, theft.claimed.ref.opened_at)
    own = replace(world, engine=theft.engine)
    journal = journal_of(own.folders("s1"), "catcher")
    journal.path.write_text(f"{NOW:%Y-%m-%d %H:%M:%S.000} MARK c{theft.claimed.ref.id}.0\n")
    transact(world.engine, lambda connection: connection.execute(sa.update(Claim).values(journal_inode=journal.end().inode, journal_offset=0)))
    done = settlement.settle_all(theft.engine, own.sender(theft.server), own.folders("s1"), journal, own.settings.sending, SECRET)
    assert done.claims == 1
    after = world.usage(theft.server, "google")
    assert before == dict.fromkeys((900, 3600, 86400), 5)
    # Unless the log proves too little, which is for another test to decide, all five are back.
    released = done.rows.get(State.PENDING, 0)
    assert after == dict.fromkeys((900, 3600, 86400), 5 - released)
    assert world.usage(theft.other, "google") == before
    world.check_counters()


def test_late_lines_of_its_log_end_doubts_about_its_rows(theft: Theft) -> None:
    """A delivery, a hard bounce and a deferral that were recorded as unknown."""
    world = theft.world
    mine = [row.contact_id for row in theft.claimed.rows]
    outcomes = [Result(number, 0, State.UNKNOWN, reason="no_outcome") for number in mine]
    transact(theft.engine, lambda connection: record(connection, theft.claimed.ref, outcomes, claim_state="open"))
    own = replace(world, engine=theft.engine)
    log = Log(own, theft.server)
    log.delivered(mine[0])
    log.refused(mine[1], "550 5.1.1 User unknown")
    log.refused(mine[2], "451 4.3.2 Try later")
    # Of another server's row, whoever has written it.
    log.delivered(theft.others.rows[0].contact_id)
    found = audit.run(theft.engine, own.settings, theft.server, journal_of(own.folders("s1"), "exim"), dt.datetime.now(dt.UTC) + dt.timedelta(seconds=10))
    assert found.resolved == {State.DELIVERED: 1, State.BOUNCED: 1, State.DEFERRED: 1}
    assert dict(found.disagreeing) == {"delivered in the log, no row in the ledger": 1}
    assert world.states() == {State.PENDING: 70, State.CLAIMED: 5, State.UNKNOWN: 2, State.DELIVERED: 1, State.BOUNCED: 1, State.DEFERRED: 1}
    with reading(world.engine) as connection:
        assert connection.execute(sa.select(Suppression.address_hash)).scalars().all() == [parse(theft.claimed.rows[1].email).hash]
    world.check_counters()


def test_it_contributes_to_a_recovery(theft: Theft) -> None:
    world = theft.world
    own = replace(world, engine=theft.engine)
    folders, mine = own.folders("s1"), theft.claimed.rows[0].contact_id
    Log(own, theft.server).delivered(mine)
    long_ago = dt.datetime.now(dt.UTC).timestamp() - 3600
    os.utime(folders.journal, (long_ago, long_ago))
    servers.recall(theft.engine, folders)
    begun = transact(world.engine, lambda connection: standing.begin(connection, NOW))
    journal = journal_of(folders, "exim")
    assert not take_part(theft.engine, own.settings, theft.server, own.sender(theft.server), journal)
    with reading(world.engine) as connection:
        offers = connection.execute(sa.select(RecoveredOffer.server_id, RecoveredOffer.contact_id, RecoveredOffer.kind)).all()
        parts = {part.server: part.part for part in standing.newest(connection).servers}  # type: ignore[union-attr]
    assert offers == [(theft.server.id, mine, "delivered")]
    assert parts["s1"] is not Part.AWAITED
    assert parts["s2"] is Part.AWAITED
    transact(world.engine, lambda connection: standing.finish(connection, begun.generation, NOW))
    assert take_part(theft.engine, own.settings, theft.server, own.sender(theft.server), journal)


def test_late_recipients_are_asked_about_without_reading_contacts(theft: Theft) -> None:
    ref, rows = theft.claimed.ref, theft.claimed.rows
    transact(theft.world.engine, lambda connection: consent.suppress(connection, [parse(rows[0].email).hash], reason="complaint", now=NOW))
    with reading(theft.engine) as connection:
        assert [wanted.message(connection, ref, row.contact_id) for row in rows] == [False, True, True, True, True]
        # Of others it learns nothing.
        assert not wanted.message(connection, ref, theft.others.rows[0].contact_id)


def test_an_account_has_exactly_the_rights_of_the_table(theft: Theft) -> None:
    with reading(theft.engine) as connection:
        granted = [row[0] for row in connection.exec_driver_sql("SHOW GRANTS")]
    schema = f"`{theft.world.engine.url.database}_servers`"
    account = re.escape(str(sa.make_url(theft.fleet.given["s1"].url).username))
    assert re.match(rf"GRANT USAGE ON \*\.\* TO `{account}`", granted[0])
    found = {re.sub(r"^GRANT (.*) ON (?:PROCEDURE )?`\w+`\.`(\w+)` TO .*$", r"\2", grant) for grant in granted[1:]}
    assert found == {view.name for view in VIEWS} | set(procedures.names())
    assert all(f" {schema}." in grant for grant in granted[1:])


def test_accounts_that_are_made_at_the_same_time_disturb_neither_each_other_nor_who_sends(theft: Theft) -> None:
    keys = ["s2", *(theft.world.server(f"made{number}").key for number in range(3))]
    asked = 0
    with ThreadPoolExecutor(len(keys)) as threads:
        given = [threads.submit(theft.fleet.give, key) for key in keys * 2]
        while not all(one.done() for one in given):
            assert theft.call("release_rows", theft.others.ref.id, theft.other.id, "[]") == [[(0,)]]
            asked += 1
    for one in given:
        one.result()
    assert asked


# --- what a thief cannot do -----------------------------------------------------------------------------------------


def test_a_thief_opens_no_table_and_makes_none(theft: Theft) -> None:
    schema = theft.world.engine.url.database
    for table in sorted(Base.metadata.tables):
        for statement in (f"SELECT 1 FROM {schema}.{table}", f"DELETE FROM {schema}.{table}", f"UPDATE {schema}.{table} SET id = 1"):
            with pytest.raises((sa.exc.DBAPIError, DatabaseUnreachable), match=r"(?i)denied"):
                theft.changes(statement)
    hidden = {"contacts", "suppressions", "subscriptions", "lists", "segments", "contact_changes", "engagement_events", "provider_usage", "links"}
    assert not hidden & {view.name for view in VIEWS}
    for statement in (
        "CREATE TABLE mine (id INT)",
        "CREATE TEMPORARY TABLE suppressions (id INT)",
        f"CREATE TEMPORARY TABLE {schema}.suppressions (id INT)",
        "CREATE OR REPLACE VIEW claims AS SELECT 1",
        "DROP VIEW claims",
        f"DROP PROCEDURE {schema}.claim_rows",
        f"CALL {schema}.claim_rows({', '.join(['NULL'] * 15)})",
        f"CALL {schema}.suppress_bounced(1, NULL, '[1]')",
        "INSERT INTO campaigns (id) VALUES (9)",
        "UPDATE campaigns SET state = 'sending'",
        "UPDATE servers SET state = 'active'",
        "INSERT INTO claims (id) VALUES (9)",
        "UPDATE claims SET lease_until = lease_until + INTERVAL 1 DAY",
        "UPDATE claims SET server_id = 2",
        "UPDATE deliveries SET address_hash = 'x'",
        "UPDATE deliveries SET provider = 'yahoo'",
        "UPDATE deliveries SET contact_id = 1000",
        "INSERT INTO deliveries (campaign_id) VALUES (1)",
        "DELETE FROM deliveries",
        "UPDATE dkim_keys SET state = 'retired'",
        "UPDATE provider_limits SET per_hour = NULL",
        "INSERT INTO holds (reason) VALUES ('mine')",
        "SELECT * FROM mysql.global_priv",
    ):
        with pytest.raises((sa.exc.DBAPIError, DatabaseUnreachable), match=r"(?i)denied"):
            theft.changes(statement)


def test_a_thief_sees_and_changes_no_row_but_its_own(theft: Theft) -> None:
    own, others = ({row.contact_id for row in claim.rows} for claim in (theft.claimed, theft.others))
    other = theft.others.rows[0].contact_id
    assert {row[0] for row in theft.rows("SELECT contact_id FROM deliveries")} == own
    assert {row[0] for row in theft.rows("SELECT contact_id FROM ledger_rows")} == own
    assert theft.rows("SELECT id FROM claims") == [(theft.claimed.ref.id,)]
    assert theft.rows("SELECT `key` FROM servers") == [("s1",)]
    assert others
    assert not others & own
    assert theft.changes("UPDATE deliveries SET state = 10 WHERE contact_id = %s", other) == 0
    assert theft.changes("UPDATE claims SET state = 'closed' WHERE id = %s", theft.others.ref.id) == 0
    assert theft.changes("UPDATE servers SET heartbeat_token = 'mine' WHERE `key` = 's2'") == 0
    for statement in (
        "INSERT INTO campaign_counters VALUES (1, 0, 'google', %s, 10, 5) ON DUPLICATE KEY UPDATE count = 0",
        "INSERT INTO campaign_minutes VALUES (1, 1, 'google', %s, 10, '', 5) ON DUPLICATE KEY UPDATE count = 0",
        "INSERT INTO recovered_offers VALUES (1, 1, 0, %s, 'delivered', 1, 250, NULL, NULL)",
        "INSERT INTO recovery_servers (generation, server_id, part, offers) VALUES ('g', %s, 'read', 0)",
    ):
        for server_id in (0, theft.other.id):
            with pytest.raises(sa.exc.DBAPIError, match="CHECK OPTION"):
                theft.changes(statement, server_id)
    with pytest.raises(sa.exc.DBAPIError, match="CHECK OPTION"):
        theft.changes("INSERT INTO sync_state VALUES ('journal', 's2', '{}', 1, '2026-01-01')")
    columns = "(month, id, occurred_at, server_id, campaign_id, contact_id, attempt, kind)"
    event = f"INSERT INTO delivery_events {columns} VALUES (202611, 1, NOW(6), 1, 1, %s, 0, 'bounced')"
    with pytest.raises(sa.exc.DBAPIError, match="CHECK OPTION"):
        theft.changes(event, other)
    # What has been recorded stays as it is.
    done = theft.claimed.rows[0].contact_id
    assert theft.changes("UPDATE deliveries SET state = 10 WHERE contact_id = %s", done) == 1
    assert theft.changes("UPDATE deliveries SET state = 0 WHERE contact_id = %s", done) == 0
    theft_states = theft.world.states()
    assert theft_states == {State.PENDING: 70, State.CLAIMED: 9, State.DELIVERED: 1}


def test_a_thief_gets_no_more_addresses_than_were_granted(theft: Theft) -> None:
    """Not in the name of another server, not by asking for refunds, and not by putting tables in the place of others."""
    world, own = theft.world, theft.world.sender(theft.server)
    as_other = replace(own, server_id=theft.other.id, incarnation=world.sender(theft.other).incarnation)
    memory = servers.recall(world.engine, world.folders("s1"))

    def claim(sender: claims.Sender) -> object:
        return claims.open_claim(
            theft.engine,
            sender,
            memory,
            claim_id=claims.new_id(),
            campaign_id=1,
            shard=0,
            provider="google",
            limit=100,
            position=Position(1, 0),
            lease_seconds=60,
        )

    with pytest.raises(claims.WrongServer, match="another incarnation"):
        claim(as_other)
    # Rows that it holds it may give back, once, and their debit in the slot of the claim. Those of others it may not.
    DatabaseClock(theft.engine, theft.claimed.ref.opened_at)
    mine = [row.contact_id for row in theft.claimed.rows]
    for claim_id, contact_ids, released in (
        (theft.others.ref.id, [row.contact_id for row in theft.others.rows], 0),
        (theft.claimed.ref.id, [row.contact_id for row in theft.others.rows], 0),
        (theft.claimed.ref.id, [*mine[:2], *mine[:2]], 2),
        (theft.claimed.ref.id, mine[:2], 0),
    ):
        assert theft.call("release_rows", claim_id, theft.other.id, str(contact_ids)) == [[(released,)]]
    assert world.usage(theft.server, "google") == dict.fromkeys((900, 3600, 86400), 3)
    assert world.usage(theft.other, "google") == dict.fromkeys((900, 3600, 86400), 5)
    # The procedure's own tables are within reach of whoever has called it, and of no use to him.
    schema = world.engine.url.database
    real = ("suppressions", "contacts", "allotments", "provider_usage", "holds", "servers", "campaigns", "deliveries")
    for own_table, name in itertools.product(("claim_rows_judged", "claim_rows_places"), real):
        with theft.engine.connect() as connection:
            call(connection, "claim_rows", (claims.new_id(), 1, 0, "google", 1, 0, own.incarnation, "b", "r", memory.generation, None, None, 1, 0, 1))
            connection.connection.rollback()
            try:
                connection.exec_driver_sql(f"RENAME TABLE {schema}.{own_table} TO {schema}.{name}")
            except sa.exc.DBAPIError:
                continue
            with pytest.raises(sa.exc.DBAPIError, match="Unknown column"):
                call(connection, "claim_rows", (claims.new_id(), 1, 0, "google", 1, 0, own.incarnation, "b", "r", memory.generation, None, None, 1, 0, 1))
            connection.connection.rollback()
            connection.invalidate()
    while isinstance(claim(own), OpenClaim):
        pass
    assert world.usage(theft.server, "google") == dict.fromkeys((900, 3600, 86400), 12)
    assert theft.rows("SELECT COUNT(*) FROM deliveries") == [(12,)]


def test_a_thief_suppresses_nobody_but_those_it_says_have_bounced(theft: Theft) -> None:
    own, others = ([row.contact_id for row in claim.rows] for claim in (theft.claimed, theft.others))
    transact(
        theft.world.engine, lambda connection: connection.execute(sa.update(Delivery).where(Delivery.contact_id.in_(others)).values(state=int(State.BOUNCED)))
    )
    assert theft.changes("UPDATE deliveries SET state = 11 WHERE contact_id = %s", own[0]) == 1
    theft.call("suppress_bounced", 1, None, str([*own, *others]))
    with reading(theft.world.engine) as connection:
        assert connection.execute(sa.select(Suppression.address_hash)).scalars().all() == [parse(theft.claimed.rows[0].email).hash]


def test_a_thief_signs_with_no_selector_of_another_server(theft: Theft) -> None:
    """One domain was registered when the servers had accounts, the other before that: of this it sees the key of all, which its token key does not open."""
    world, stolen = theft.world, derive(SECRET, "s1")
    shop, other = (store.add(world.engine, Names.of(f"{name}.test"), SECRET, NOW) for name in ("shop", "other"))
    own = sa.and_(DkimKey.domain_id == other.id, DkimKey.server_id != ALL_SERVERS)
    transact(world.engine, lambda connection: connection.execute(sa.delete(DkimKey).where(own)))
    common, mine, theirs = (key.selector for key in shop.keys)
    # The key of all only where it has none of its own.
    assert {tuple(row) for row in theft.rows("SELECT domain_id, selector FROM dkim_keys")} == {(shop.id, mine), (other.id, other.keys[0].selector)}
    with reading(theft.engine) as connection:
        found = sending_as(connection, "shop.test", theft.server.id, stolen)
        assert found is not None
        assert found.signer.selector == mine
        with pytest.raises(KeyNotOpened):
            sending_as(connection, "other.test", theft.server.id, stolen)
    done = accounts.revoke(world.engine, "s1", NOW)
    assert done.records == (f"{mine}._domainkey.shop.test",)
    with reading(world.engine) as connection:
        left = connection.execute(sa.select(DkimKey.selector).where(DkimKey.private_key.is_not(None))).scalars().all()
    assert sorted(left) == sorted([common, theirs, other.keys[0].selector])


# --- the end of an account --------------------------------------------------------------------------------------------


def test_revoking_is_one_command_and_acts_at_once(theft: Theft, monkeypatch: pytest.MonkeyPatch) -> None:
    world = theft.world
    context.settings.cache_clear()
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", world.engine.url.render_as_string(hide_password=False))
    with theft.engine.connect() as open_for_long:
        assert open_for_long.exec_driver_sql("SELECT COUNT(*) FROM claims").scalar_one() == 1
        done = CliRunner().invoke(commands.app, ["revoke", "s1"])
        assert done.exit_code == 0, done.output
        assert "5 recipients it had in hand are unknown now" in done.output
        with pytest.raises(sa.exc.DBAPIError):
            open_for_long.exec_driver_sql("SELECT COUNT(*) FROM claims")
    with pytest.raises(DatabaseUnreachable, match="Access denied"):
        theft.rows("SELECT 1")
    assert world.states() == {State.PENDING: 70, State.CLAIMED: 5, State.UNKNOWN: 5}
    with reading(world.engine) as connection:
        assert connection.execute(sa.select(Server.state, Server.account).order_by(Server.id)).all()[0] == ("retired", None)
        assert connection.execute(sa.select(Claim.state).where(Claim.server_id == theft.server.id)).scalars().all() == ["closed"]
    world.check_counters()
    # The other goes on.
    with reading(theft.fleet.connect("s2")) as connection:
        assert connection.exec_driver_sql("SELECT COUNT(*) FROM claims").scalar_one() == 1
    assert CliRunner().invoke(commands.app, ["revoke", "s1"]).exit_code == 0


def test_an_account_that_was_revoked_is_nobody_on_an_open_connection(theft: Theft) -> None:
    """Also where the centre could not end the connection."""
    with theft.engine.connect() as connection:
        transact(theft.world.engine, lambda centre: centre.execute(sa.update(Server).where(Server.key == "s1").values(account=None)))
        assert connection.exec_driver_sql("SELECT COUNT(*) FROM claims").scalar_one() == 0
        assert connection.exec_driver_sql("SELECT COUNT(*) FROM deliveries").scalar_one() == 0
        sender = theft.world.sender(theft.server)
        arguments = (claims.new_id(), 1, 0, "google", 9, sender.server_id, sender.incarnation, "b", "r", "g", None, None, 1, 0, 1)
        assert call(connection, "claim_rows", arguments)[0][0][0] == "unregistered"
        connection.rollback()


def test_a_connection_that_breaks_over_accounts_is_named_and_holds_nobody_up(fleet: Accounts) -> None:
    engine = fleet.world.engine
    fleet.world.server()
    fleet.give("s1")

    lock = (f"{engine.url.database} accounts",)

    def breaks() -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql("KILL %s", (connection.exec_driver_sql("SELECT IS_USED_LOCK(%s)", lock).scalar_one(),))

    with pytest.raises(DatabaseUnreachable, match="no connection to"):
        accounts.give(engine, "s1", breaks)
    # Nor does an error that leaves the connection whole.
    with pytest.raises(KeyHeld):
        accounts.give(engine, "s1", mock.Mock(side_effect=KeyHeld("not now")))
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT GET_LOCK(%s, 10)", lock).scalar_one() == 1
        connection.exec_driver_sql("SELECT RELEASE_LOCK(%s)", lock)


def test_the_command_keeps_the_password_in_a_file_and_shows_it_nowhere(fleet: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    world = fleet.world
    world.server()
    context.settings.cache_clear()
    store.add(world.engine, Names.of("shop.test"), SECRET, NOW)
    passwords = []
    secrets = world.settings.home / "secrets" / "servers"
    for _ in range(2):
        done = CliRunner().invoke(commands.app, ["account", "s1"])
        assert done.exit_code == 0, done.output
        passwords.append((secrets / "s1.password").read_text().strip())
        own_key = (secrets / "s1.token_key").read_text().strip()
        assert own_key.encode() == derive(SECRET, "s1")
        for place, secret in (("s1.password", passwords[-1]), ("s1.token_key", own_key)):
            assert (secrets / place).stat().st_mode & 0o777 == 0o600
            assert secret not in done.output
        # Its DKIM key was made with the account, and waits until its record is published.
        assert ("._domainkey.shop.test. 3600 IN TXT" in done.output) == ("mail-pipelines server dkim s1" in done.output) == (len(passwords) == 1)
        taken = CliRunner().invoke(commands.app, ["dkim", "s1", "--allow-unverified"])
        assert (taken.exit_code, taken.output) == (0, "server s1 signs the mail of all domains with keys of its own\n")
        with reading(world.engine) as connection:
            assert sending_as(connection, "shop.test", 1, own_key.encode()) is not None
        (url,) = re.findall(r"DATABASE__URL=(\S+)", done.output)
        fleet.given["s1"] = accounts.Account("s1", url, passwords[-1])
        assert servers_seen_by(fleet.connect("s1"), "s1").key == "s1"
    old = create_engine(url, passwords[0])
    with pytest.raises(DatabaseUnreachable, match="Access denied"), reading(old):
        pass
    # One at work gets another password, and keeps the key that it has.
    world.set_server("s1", heartbeat_at=NOW)
    (secrets / "s1.token_key").unlink()
    done = CliRunner().invoke(commands.app, ["account", "s1"])
    assert "server drain s1" in done.output
    assert not (secrets / "s1.token_key").exists()
    fleet.given["s1"] = accounts.Account("s1", url, (secrets / "s1.password").read_text().strip())
    # An upgrade of the schema keeps what accounts may do.
    migrate.upgrade(world.engine)
    with reading(fleet.connect("s1")) as connection:
        assert call(connection, "recipient_wanted", (1, 1, 1)) == [[]]
