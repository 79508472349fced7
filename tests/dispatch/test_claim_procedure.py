"""The stored procedure as a part of its own: whose rights it needs, what it gives away, and what happens when it is in somebody's way or gone."""

from __future__ import annotations

import dataclasses
import datetime as dt
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.contacts import consent
from mail_pipelines.contacts.addresses import parse
from mail_pipelines.database import migrate
from mail_pipelines.database.engine import DatabaseError, DatabaseUnreachable, create_engine, transact
from mail_pipelines.database.models import Allotment, Contact, Delivery, ProviderUsage, State, WindowSpan
from mail_pipelines.database.procedures import installation
from mail_pipelines.database.procedures.calling import call
from mail_pipelines.dispatch import claims, servers
from mail_pipelines.dispatch.claiming import procedure
from mail_pipelines.dispatch.claims import NothingClaimed, OpenClaim
from mail_pipelines.dispatch.journal import Position
from tests.dispatch.world import World, make_world
from tests.parts.backups import Backup
from tests.parts.processes import wait_for


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    return make_world(engine, tmp_path / "home", recipients=40)


@pytest.fixture
def server(world: World) -> servers.ServerInfo:
    server = world.server()
    world.grant(server)
    return server


def claim_on(engine: sa.Engine, world: World, server: servers.ServerInfo, claim_id: int | None = None) -> OpenClaim | NothingClaimed:
    """A claim of ten rows over another engine than the world's."""
    return claims.open_claim(
        engine,
        world.sender(server),
        servers.recall(world.engine, world.folders(server.key)),
        claim_id=claim_id or claims.new_id(),
        campaign_id=1,
        shard=0,
        provider="google",
        limit=10,
        position=Position(1, 0),
        lease_seconds=60,
    )


def everything(engine: sa.Engine) -> dict[str, list[Any]]:
    metadata = sa.MetaData()
    metadata.reflect(engine, only=["allotments", "campaign_counters", "claims", "deliveries", "provider_usage"])
    with engine.connect() as connection:
        return {name: sorted(connection.execute(sa.select(table)).all(), key=repr) for name, table in metadata.tables.items()}


def test_a_claim_that_fails_at_its_last_step_leaves_nothing_behind(world: World, server: servers.ServerInfo) -> None:
    opened = claim_on(world.engine, world, server, claim_id=7)
    assert isinstance(opened, OpenClaim)
    transact(world.engine, lambda connection: connection.exec_driver_sql("UPDATE deliveries SET state = 0, claim_id = 0"))
    before = everything(world.engine)
    with pytest.raises(sa.exc.IntegrityError):
        claim_on(world.engine, world, server, claim_id=7)
    assert everything(world.engine) == before


def status(engine: sa.Engine, name: str) -> int:
    """A number of the server's status, for instance how many deadlocks it has ended; no other test of this process runs meanwhile."""
    with engine.connect() as connection:
        return int(connection.execute(sa.text("SHOW GLOBAL STATUS LIKE :name"), {"name": name}).one()[1])


@pytest.mark.parametrize("database_url", [pytest.param("mariadb", marks=pytest.mark.server)], indirect=True)
def test_a_claim_that_begins_during_a_restore_sees_that_the_database_went_back(world: World, server: servers.ServerInfo) -> None:
    """Failure scenario 4: the server has claimed nothing since the backup, so only its heartbeat tells, and the claim waits for the campaign's row."""
    earlier = dt.datetime(2026, 11, 24, 12, 0, tzinfo=dt.UTC)
    later = earlier + dt.timedelta(minutes=5)
    world.set_server(server.key, heartbeat_at=earlier)
    backup = Backup(world.engine)
    world.set_server(server.key, heartbeat_at=later)
    memory = dataclasses.replace(servers.recall(world.engine, world.folders(server.key)), last_beat=later)
    with ThreadPoolExecutor(1) as pool, world.engine.connect() as connection:
        backup.put_back(connection)
        asked = pool.submit(world.claim, server, memory=memory)
        wait_for(lambda: status(world.engine, "Innodb_row_lock_current_waits") == 1, what="the claim to wait")
        connection.commit()
        with pytest.raises(claims.WrongServer, match="went back in time"):
            asked.result()
    assert world.states() == {State.PENDING: 40}


@pytest.mark.parametrize("database_url", [pytest.param("mariadb", marks=pytest.mark.server)], indirect=True)
class TestOnMariaDB:
    """On SQLite there is no procedure."""

    def test_an_account_that_may_not_read_contacts_claims_and_gets_no_address_beside_its_rows(
        self, mariadb: MariaDB, world: World, server: servers.ServerInfo
    ) -> None:
        schema = world.engine.url.database
        now = dt.datetime.now(dt.UTC)

        def hinder(connection: sa.Connection) -> None:
            consent.suppress(connection, [parse("person1@google.test").hash], reason="complaint", now=now)
            moved = parse("new@yahoo.test")
            values = {"email": moved.email, "address": moved.address, "address_hash": moved.hash, "domain": moved.domain, "provider": "yahoo"}
            connection.execute(sa.update(Contact).where(Contact.id == 5).values(values))

        transact(world.engine, hinder)
        with mariadb.connect() as connection, connection.cursor() as cursor:
            cursor.execute("CREATE OR REPLACE USER thief@'%'")
            cursor.execute(f"GRANT EXECUTE ON PROCEDURE {schema}.claim_rows TO thief@'%'")
        stolen = create_engine(str(world.engine.url).replace("root@", "thief@"))
        with stolen.connect() as connection:
            for table in ("contacts", "suppressions", "subscriptions", "servers", "claims"):
                with pytest.raises(sa.exc.OperationalError, match="denied"):
                    connection.exec_driver_sql(f"SELECT * FROM {table}")
            # A table of its own under the name of a real one would be read by the procedure in its place.
            with pytest.raises(sa.exc.OperationalError, match="denied"):
                connection.exec_driver_sql("CREATE TEMPORARY TABLE suppressions (id INT)")
            sender, memory = world.sender(server), servers.recall(world.engine, world.folders(server.key))
            arguments = (1, 1, 0, "google", 3, sender.server_id, sender.incarnation, "b", "r", memory.generation, None, None, 1, 0, 60_000_000)
            verdict, rows = call(connection, procedure.NAME, arguments)
            connection.rollback()
        assert verdict[0][0] is None
        assert [row[2] for row in rows] == ["person9@google.test"]
        opened = claim_on(stolen, world, server)
        assert isinstance(opened, OpenClaim)
        assert sorted(row.contact_id for row in opened.rows) == [9, 13, 17, 21, 25, 29, 33, 37]
        assert world.states() == {State.PENDING: 31, State.CLAIMED: 8, State.SUPPRESSED: 1}
        world.check_counters()
        stolen.dispose()

    def test_a_claim_that_loses_a_deadlock_is_made_again(self, world: World, server: servers.ServerInfo) -> None:
        servers.set_limits(world.engine, None, "*", {"per_hour": 1000})
        assert isinstance(world.claim(server, limit=1), OpenClaim)
        answers: list[Any] = []
        before = status(world.engine, "Innodb_deadlocks")
        claimer = threading.Thread(target=lambda: answers.append(world.claim(server, limit=2)))
        with world.engine.connect() as connection:
            # Much written, so that not this transaction is the victim.
            connection.execute(sa.update(Contact).values(time_zone="Europe/Berlin"))
            connection.execute(sa.select(ProviderUsage).with_for_update()).all()
            claimer.start()
            waiting = sa.text("SELECT COUNT(*) FROM information_schema.processlist WHERE db = DATABASE() AND info LIKE 'INSERT INTO provider_usage%'")
            with world.engine.connect() as watcher:
                wait_for(lambda: watcher.execute(waiting).scalar_one(), what="the claim waits for the limits")
            # The claim holds this row: now each waits for the other.
            connection.execute(sa.select(Allotment).where(Allotment.provider == "google").with_for_update()).all()
            assert answers == []
            connection.commit()
        claimer.join()
        assert len(answers[0].rows) == 2
        assert status(world.engine, "Innodb_deadlocks") == before + 1
        assert world.usage(server, "google") == {900: 3, 3600: 3, 86400: 3}
        world.check_counters()

    def test_a_connection_goes_on_where_its_last_claim_ended_and_leaves_nothing_behind(self, world: World, server: servers.ServerInfo) -> None:
        """Else each claim would read the index entries of all rows that were claimed in the last seconds."""

        def contacts(limit: int) -> list[int]:
            opened = world.claim(server, limit=limit)
            assert isinstance(opened, OpenClaim)
            return [row.contact_id for row in opened.rows]

        def give_back(contact_ids: list[int]) -> None:
            rows = sa.update(Delivery).where(Delivery.contact_id.in_(contact_ids)).values(state=int(State.PENDING), claim_id=None)
            transact(world.engine, lambda connection: connection.execute(rows))

        everybody = contacts(40)
        assert len(everybody) == 10
        give_back(everybody)
        world.engine.dispose()
        assert contacts(2) == everybody[:2]
        give_back(everybody[:2])
        assert contacts(2) == everybody[1:3]
        # More than are left there: the others too.
        assert contacts(8) == [*everybody[3:], *everybody[:1]]
        give_back(everybody)
        assert contacts(1) == everybody[-1:]
        give_back(everybody)
        transact(world.engine, lambda connection: connection.exec_driver_sql("UPDATE claim_rows_places SET since = since - 31"))
        assert contacts(1) == everybody[:1]
        give_back(everybody)
        world.engine.dispose()
        assert contacts(1) == everybody[:1]

    def test_it_goes_on_among_deferred_rows_where_most_are_deferred_until_a_window_opens(self, world: World, server: servers.ServerInfo) -> None:
        def contacts(limit: int) -> list[int]:
            opened = world.claim(server, limit=limit)
            assert isinstance(opened, OpenClaim)
            return [row.contact_id for row in opened.rows]

        def defer(contact_ids: Iterable[int]) -> None:
            rows = sa.update(Delivery).where(Delivery.contact_id.in_(contact_ids), Delivery.provider == "google")
            values = {"state": int(State.DEFERRED), "claim_id": None, "reason": "window", "sort_key": now - 50 + Delivery.contact_id}
            transact(world.engine, lambda connection: connection.execute(rows.values(values)))

        now = int(dt.datetime.now(dt.UTC).timestamp()) - 100
        spans = [{"campaign_id": 1, "time_zone": "", "opens_at": now - 60, "closes_at": now + 9000}]
        transact(world.engine, lambda connection: connection.execute(sa.insert(WindowSpan), spans))
        world.set_campaign(send_window={"from": "00:00", "until": "24:00", "zone": "UTC"})
        defer(range(1, 41))
        everybody = contacts(3) + contacts(40)
        assert everybody == sorted(everybody)
        assert len(everybody) == 10
        defer(everybody)
        world.engine.dispose()
        assert contacts(2) == everybody[:2]
        defer(everybody[:2])
        assert contacts(2) == everybody[1:3]
        # More than are left there: the others too.
        assert contacts(8) == [*everybody[3:], *everybody[:1]]
        defer(everybody)
        transact(world.engine, lambda connection: connection.exec_driver_sql("UPDATE claim_rows_dues SET since = since - 31"))
        assert contacts(1) == everybody[:1]
        # One row before the place where the last claim ended is found when there is nothing behind it.
        world.engine.dispose()
        assert contacts(9) == everybody[1:]
        defer(everybody[3:4])
        assert contacts(5) == everybody[3:4]

    def test_a_dump_without_procedures_is_mended_by_init(self, world: World, server: servers.ServerInfo) -> None:
        transact(world.engine, lambda connection: installation.remove(connection, procedure.NAME))
        with pytest.raises(DatabaseError, match="lacks a stored procedure; run `mail-pipelines init`"):
            world.claim(server)
        migrate.upgrade(world.engine)
        assert isinstance(world.claim(server), OpenClaim)

    def test_a_connection_lost_in_a_call_is_told_as_such(self, world: World) -> None:
        def work(connection: sa.Connection) -> None:
            number = connection.exec_driver_sql("SELECT CONNECTION_ID()").scalar_one()
            with world.engine.connect() as killer:
                killer.exec_driver_sql(f"KILL {number}")
            call(connection, procedure.NAME, (None,) * 14)

        with pytest.raises(DatabaseUnreachable, match=r"no connection to .*: (Lost connection|.*gone away|.*killed)"):
            transact(world.engine, work)

    def test_procedures_are_installed_under_their_file_names(self, engine: sa.Engine) -> None:
        with engine.connect() as connection:
            found = connection.exec_driver_sql("SELECT routine_name, security_type FROM information_schema.routines WHERE routine_schema = DATABASE()").all()
        assert [tuple(row) for row in found] == [(name, "DEFINER") for name in installation.names()]
        assert transact(engine, installation.install_missing) == []
