"""An embedded installation moves to MariaDB in the middle of a campaign, is killed on the way, and mails nobody twice and everybody once."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.cli import app
from mail_pipelines.commands import context
from mail_pipelines.database import migrate
from mail_pipelines.database.engine import create_engine
from mail_pipelines.database.models import State
from mail_pipelines.dispatch import holds
from mail_pipelines.supervision import Processes
from mail_pipelines.up import lock
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.world import Servers, World, make_world, settings_for, write_play
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)]
RECIPIENTS = 7_000


@pytest.fixture(autouse=True)
def _settings_of_this_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MAIL_PIPELINES_SERVER__HEARTBEAT_SECONDS", "1")
    context.settings.cache_clear()
    yield
    context.settings.cache_clear()


@pytest.fixture
def target(mariadb: MariaDB) -> Iterator[sa.Engine]:
    """An empty database, without any table."""
    url = mariadb.database()
    engine = create_engine(url)
    yield engine
    engine.dispose()
    mariadb.drop(url)


def command(target: sa.Engine) -> list[str]:
    return ["database", "copy", "--to", target.url.render_as_string(hide_password=False)]


def copy(target: sa.Engine, status: int = 0) -> str:
    """What the command says, line breaks as spaces."""
    done = CliRunner().invoke(app, command(target))
    said = f"{done.output} {done.exception or ''}"
    assert done.exit_code == status, said
    return " ".join(said.split())


def rows(engine: sa.Engine, table: str, columns: str = "*") -> list[tuple[object, ...]]:
    """As the driver has them, in any order."""
    with engine.connect() as connection:
        return sorted(tuple(row) for row in connection.exec_driver_sql(f"SELECT {columns} FROM {table}"))


def count(engine: sa.Engine, table: str) -> int:
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table(table):
            return 0
        return int(connection.exec_driver_sql(f"SELECT COUNT(*) FROM {table}").scalar_one())


def test_a_campaign_under_way_goes_on_in_the_other_database(engine: sa.Engine, target: sa.Engine, tmp_path: Path, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", recipients=RECIPIENTS, lease_seconds=16)
    server = world.server(connections=8, per_second=1e4)
    catcher = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.0, 0.1]))
    world.grant(server)
    session = SessionProcess(world, server.key, "before")
    wait_for(lambda: len(world.kept()) > 300, what="messages under way")
    # While they are counted it opens no more.
    session.signal(signal.SIGSTOP)
    connections = catcher.connections()
    session.kill()

    said = copy(target, status=1)
    assert "everything is held now, but the processes of s1 still work" in said
    assert world.hold_of_everything() is not None
    catcher.process.terminate()
    catcher.process.wait()
    # What it settled of the killed session's rows, or did not, goes along.
    wait_for(lambda: "still work" not in copy_once(target), seconds=90, what="the silence of the server")
    assert count(target, "deliveries") < RECIPIENTS
    assert world.hold_of_everything() is not None

    said = copy(target)
    assert "has it all: let database.url name it" in said
    assert_the_same(engine, target)
    with pytest.raises(migrate.SchemaOutdated, match="was copied to another one"):
        migrate.require_schema(engine)
    assert "moved before" in copy(target, status=1)

    there = World(target, settings_for(target, tmp_path / "home", lease_seconds=16))
    assert there.hold_of_everything() is None
    catcher.start()
    SessionProcess(there, server.key, "after").wait()
    states = there.states()
    copies = there.copies()
    assert set(copies.values()) == {1}
    assert states[State.DELIVERED] + states[State.UNKNOWN] == RECIPIENTS
    assert states[State.UNKNOWN] <= connections
    assert len(copies) >= states[State.DELIVERED]
    there.check_counters()


def copy_once(target: sa.Engine) -> str:
    """Give the command, and kill it when it has copied something and waits for the ledger, which is locked; returns what it said until then."""
    migrate.upgrade(target)
    with target.connect() as locking:
        locking.exec_driver_sql("LOCK TABLES deliveries READ")
        process = subprocess.Popen([sys.executable, "-m", "mail_pipelines", *command(target)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for(lambda: process.poll() is not None or count(target, "contacts") >= 5_000, seconds=90, what="some of the copy")
        process.kill()
        said, _ = process.communicate()
        locking.exec_driver_sql("UNLOCK TABLES")
    assert "has it all" not in said
    return said


def assert_the_same(engine: sa.Engine, target: sa.Engine) -> None:
    """Counted and read without the code that copied."""
    for table in sa.inspect(engine).get_table_names():
        if table not in ("alembic_version", "holds", "sync_state"):
            assert count(target, table) == count(engine, table), table
    for table, columns in (
        ("contacts", "id, email, address, address_hash, domain, provider, tracking_allowed"),
        ("deliveries", "campaign_id, contact_id, address_hash, shard, provider, state, sort_key, attempt, claim_id, server_id, code, enhanced"),
        ("claims", "id, campaign_id, run_id, size, state, incarnation, journal_inode, journal_offset"),
        ("campaign_counters", "*"),
        ("campaign_versions", "id, sha256, compiled"),
    ):
        assert rows(target, table, columns) == rows(engine, table, columns), table
    assert rows(target, "contacts", "id, JSON_VALUE(attributes, '$.first_name')") == rows(engine, "contacts", "id, attributes ->> '$.first_name'")
    assert rows(target, "contacts", "id, DATE_FORMAT(created_at, '%%Y-%%m-%%d %%H:%%i:%%s.%%f')") == rows(engine, "contacts", "id, created_at")


def test_a_changed_copy_is_found_and_put_right(engine: sa.Engine, target: sa.Engine, tmp_path: Path) -> None:
    """Rows that are gone, too many, different, or have changed places since an interrupted copy."""
    from mail_pipelines.database import copying

    make_world(engine, tmp_path / "home", recipients=RECIPIENTS)
    migrate.upgrade(target)
    tables = {table.name: table for table in copying.tables()}
    with engine.connect() as source:
        for table in copying.tables():
            copying.copy(source, target, table, lambda _: None)
    with target.begin() as connection:
        connection.exec_driver_sql("DELETE FROM contacts WHERE id BETWEEN 4000 AND 6000")
        connection.exec_driver_sql("UPDATE contacts SET email = 'another@small.test' WHERE id = 6500")
        last = connection.exec_driver_sql("SELECT address_hash FROM contacts WHERE id = 6999").scalar_one()
        connection.exec_driver_sql("UPDATE contacts SET address_hash = UNHEX(REPEAT('AB', 16)) WHERE id = 6999")
        connection.exec_driver_sql("UPDATE contacts SET address_hash = %s WHERE id = 10", (last,))
        connection.exec_driver_sql("UPDATE contacts SET id = 20000 WHERE id = 6800")
    with engine.connect() as source:
        here, there = copying.compare(source, target, tables["contacts"], lambda _: None)
        assert (here.rows, there.rows) == (RECIPIENTS, RECIPIENTS - 2001)
        assert here.sha256 != there.sha256
        assert copying.copy(source, target, tables["contacts"], lambda _: None) == 2001 + 4
        here, there = copying.compare(source, target, tables["contacts"], lambda _: None)
        assert here == there
        assert copying.copy(source, target, tables["contacts"], lambda _: None) == 0
    assert rows(target, "contacts", "id, address_hash") == rows(engine, "contacts", "id, address_hash")


def test_where_it_must_not_go(engine: sa.Engine, target: sa.Engine, tmp_path: Path) -> None:
    world = make_world(engine, tmp_path / "home", recipients=10)
    migrate.upgrade(target)
    assert "give --to mysql+pymysql" in copy(engine, status=1)
    with Processes(lock=lock(world.settings.home)):
        assert "stop that one first" in copy(target, status=1)
    assert world.hold_of_everything() is None
    other = World(target, world.settings)
    other.server()
    assert "has an installation already" in copy(target, status=1)
    assert count(target, "contacts") == 0


def test_a_hold_that_was_there_before_stays(engine: sa.Engine, target: sa.Engine, tmp_path: Path) -> None:
    world = make_world(engine, tmp_path / "home", recipients=10)
    world.hold(holds.Kind.EVERYTHING, reason="a review")
    copy(target)
    held = World(target, world.settings).hold_of_everything()
    assert held is not None
    assert held.reason == "a review"
