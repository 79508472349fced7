"""The schema: from empty to head on both servers, no difference to the models, partitions where they belong."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from pytest_alembic import Config
from pytest_alembic.tests import (  # noqa: F401
    test_model_definitions_match_ddl,
    test_single_head_revision,
    test_up_down_consistency,
    test_upgrade,
)

from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.database import migrate, partitions
from mail_pipelines.database.engine import DatabaseError, create_engine, is_mysql
from mail_pipelines.database.models import Base, Campaign
from mail_pipelines.database.types import UtcDateTime
from mail_pipelines.dispatch import holds


@pytest.fixture
def alembic_config() -> Config:
    return Config(config_options={"script_location": "mail_pipelines/database/migrations"})


@pytest.fixture
def alembic_engine(tmp_path) -> sa.Engine:
    return create_engine(f"sqlite:///{tmp_path / 'alembic.sqlite3'}")


def test_autogenerate_finds_no_difference(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), Base.metadata) == []


def test_the_newest_revision_is_alembics_head(engine: sa.Engine) -> None:
    script = ScriptDirectory.from_config(migrate.alembic_config(engine))
    assert script.get_current_head() == migrate.newest_revision()


def test_every_model_has_its_table(engine: sa.Engine) -> None:
    assert set(Base.metadata.tables) <= set(sa.inspect(engine).get_table_names())


@pytest.mark.server
def test_down_and_up_again_on_mariadb(mariadb: MariaDB) -> None:
    engine = create_engine(mariadb.database())
    migrate.upgrade(engine)
    command.downgrade(migrate.alembic_config(engine), "base")
    assert set(sa.inspect(engine).get_table_names()) == {"alembic_version"}
    migrate.upgrade(engine)
    migrate.require_schema(engine)


@pytest.fixture(params=["sqlite", pytest.param("mariadb", marks=pytest.mark.server)])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> sa.Engine:
    """An engine on a database without tables."""
    if request.param == "sqlite":
        return create_engine(f"sqlite:///{tmp_path / 'old.sqlite3'}")
    server: MariaDB = request.getfixturevalue("mariadb")
    return create_engine(server.database())


def test_reasons_of_held_campaigns_become_holds(old: sa.Engine) -> None:
    config = migrate.alembic_config(old)
    command.upgrade(config, "0006")
    changed = dt.datetime(2026, 3, 2, 9, 0, 0, 500, tzinfo=dt.UTC)
    campaigns = {"held": ("sending", "100 % bad"), "free": ("sending", None), "empty": ("paused", ""), "over": ("cancelled", "zu spät")}
    columns = ["key", "name", "state", "held_reason", "brand_id", "segments", "unsubscribe", "on_unknown", "priority", "created_at", "updated_at"]
    table = sa.table("campaigns", sa.column("id"), *(sa.column(name, UtcDateTime() if name.endswith("_at") else None) for name in columns))
    with old.begin() as connection:
        connection.exec_driver_sql("INSERT INTO brands (id, `key`, name, postal_address, created_at) VALUES (1, 'b', 'B', '', '2026-01-01')")
        connection.exec_driver_sql("INSERT INTO pools (id, `key`) VALUES (1, 'default')")
        for number, (key, (state, reason)) in enumerate(campaigns.items(), 1):
            values = (key, key, state, reason, 1, "{}", "all", "hold", 1, changed, changed)
            connection.execute(sa.insert(table).values(id=number, **dict(zip(columns, values, strict=True))))
    command.upgrade(config, "head")
    with old.connect() as connection:
        found = holds.recorded(connection, 10)
        # They had no pool, and with it all servers, which were all in the default one.
        assert set(connection.execute(sa.select(Campaign.pool_id, Campaign.overflow_pool_id)).tuples()) == {(1, None)}
    assert [(hold.what, hold.reason, hold.created_at, hold.released_at) for hold in found] == [
        ("campaign over", "zu spät", changed, changed),
        ("campaign held", "100 % bad", changed, None),
    ]
    command.downgrade(config, "0006")
    with old.connect() as connection:
        assert connection.execute(sa.select(table.c.held_reason).order_by(table.c.id)).scalars().all() == ["100 % bad", None, None, None]


def test_upgrade_twice_keeps_the_generation(engine: sa.Engine) -> None:
    query = "SELECT generation FROM ledger_generation"
    with engine.connect() as connection:
        before = connection.exec_driver_sql(query).all()
    migrate.upgrade(engine)
    with engine.connect() as connection:
        assert connection.exec_driver_sql(query).all() == before
        assert len(before) == 1


def test_old_and_empty_schemas_are_refused_by_name(tmp_path, engine: sa.Engine) -> None:
    with pytest.raises(migrate.SchemaOutdated, match="no tables yet: run `mail-pipelines init`"):
        migrate.require_schema(create_engine(f"sqlite:///{tmp_path / 'empty.sqlite3'}"))
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0000'")
    with pytest.raises(migrate.SchemaOutdated, match="at schema 0000"):
        migrate.require_schema(engine)


def test_an_older_version_goes_on_with_a_newer_schema_until_that_needs_more(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    migrate.require_schema(engine)
    with pytest.raises(migrate.SchemaOutdated, match=r"at schema 9999, which .* does not know"):
        migrate.upgrade(engine)
    monkeypatch.setattr(migrate, "newest_revision", lambda: migrate.OLDEST)
    migrate.require_schema(engine)
    monkeypatch.setattr(migrate, "newest_revision", lambda: "0012")
    with pytest.raises(migrate.SchemaOutdated, match=f"too old for the central database: it knows schema 0012, .* needs {migrate.OLDEST} at least"):
        migrate.require_schema(engine)


def test_partitions_are_made_ahead_and_once(engine: sa.Engine) -> None:
    now = dt.datetime.now(dt.UTC)
    today = now.date()
    if is_mysql(engine):
        # A day of the month in which the tables were made, which may be over.
        with engine.connect() as connection:
            month = partitions._bounds(connection, "delivery_events")[0]
        today = dt.date(month // 100, month % 100, 1)
    assert partitions.extend(engine, today) == []
    with engine.begin() as connection:
        connection.execute(
            sa.insert(Campaign).values(
                id=1000,
                key="late",
                name="late",
                state="draft",
                brand_id=1,
                segments={},
                unsubscribe="all",
                on_unknown="hold",
                priority=1,
                created_at=now,
                updated_at=now,
            )
        )
    added = partitions.extend(engine, today + dt.timedelta(days=40))
    if not is_mysql(engine):
        assert added == []
        return
    assert "deliveries.c1024" in added
    assert any(name.startswith("engagement_events.m") for name in added)
    assert partitions.extend(engine, today + dt.timedelta(days=40)) == []


def test_isolation_is_read_committed_and_durability_full(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        if is_mysql(engine):
            assert connection.get_isolation_level() == "READ COMMITTED"
            assert connection.exec_driver_sql("SELECT @@time_zone").scalar_one() == "+00:00"
        else:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2  # FULL
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == 30_000


def test_a_foreign_url_is_refused() -> None:
    with pytest.raises(DatabaseError, match="expected sqlite, mysql or mariadb"):
        create_engine("postgresql://localhost/x")
