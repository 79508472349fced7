"""SQL databases as sources: SQLite and MariaDB, whole and by a cursor."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.sources.declaration import Source
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.running import Report
from tests.parts.postgresql import PostgreSQL
from tests.sources.conftest import Declare, contacts, subscribed

pytestmark = pytest.mark.slow
Sync = Callable[..., Report]
MAP = {"id": "external_id", "mail": "email", "name": "first_name", "spent": "spent", "born": "born", "vip": "vip", "changed": "changed_at"}
START = dt.datetime(2026, 1, 1, 12, 0)


@pytest.fixture
def shop(engine: sa.Engine, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[sa.Engine, sa.Table]]:
    """A shop's table of customers, on the same kind of database as the central one."""
    server: MariaDB | None = request.getfixturevalue("mariadb") if engine.dialect.name != "sqlite" else None
    url = server.database() if server else f"sqlite:///{tmp_path / 'shop.sqlite3'}"
    other = sa.create_engine(url)
    table = sa.Table(
        "customers",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("mail", sa.String(200)),
        sa.Column("name", sa.String(200)),
        sa.Column("spent", sa.Numeric(10, 2)),
        sa.Column("born", sa.Date),
        sa.Column("vip", sa.Boolean),
        sa.Column("changed", sa.DateTime),
        sa.Column("secret", sa.String(50)),
    )
    table.create(other)
    with other.begin() as connection:
        connection.execute(sa.insert(table), [row(number) for number in range(50)])
    yield other, table
    other.dispose()
    if server:
        server.drop(url)


def row(number: int, **more: Any) -> dict[str, Any]:
    given = {"id": number, "mail": f"p{number}@example.test", "name": f"P{number} Müller", "spent": number + 0.5, "born": dt.date(1990, 1, 2)}
    return given | {"vip": number == 1, "changed": START + dt.timedelta(minutes=number), "secret": "not ours"} | more


@pytest.fixture
def source(declare: Declare, shop: tuple[sa.Engine, sa.Table], monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setenv("SHOP_URL", shop[0].url.render_as_string(hide_password=False))
    return declare(
        name="shop", kind="sql", connection={"url_env": "SHOP_URL"}, contacts={"read": {"table": "customers"}, "map": MAP, "cursor": "changed", "overlap": 60}
    )


def test_a_table_is_read_whole_and_then_by_its_cursor(shop: tuple[sa.Engine, sa.Table], engine: sa.Engine, source: Source, sync: Sync) -> None:
    other, table = shop
    first = sync(source)
    assert first.standing.counts["inserted"] == 50
    assert contacts(engine)["p1@example.test"] == {"first_name": "P1 Müller", "spent": 1.5, "born": "1990-01-02", "vip": True}
    assert len(subscribed(engine)) == 50
    with other.begin() as connection:
        connection.execute(sa.update(table).where(table.c.id == 3).values(name="New", changed=START + dt.timedelta(hours=2)))
    second = sync(source)
    # The two rows of the last minute are asked for again.
    assert (second.standing.counts["read"], second.standing.counts["updated"]) == (3, 1)
    assert contacts(engine)["p3@example.test"]["first_name"] == "New"


@pytest.mark.server
def test_a_database_of_another_kind_is_read(engine: sa.Engine, declare: Declare, sync: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL, with types that only it has."""
    server = PostgreSQL()
    try:
        there = server.engine()
        with there.begin() as connection:
            connection.exec_driver_sql("CREATE SCHEMA shop")
            connection.exec_driver_sql("CREATE TABLE shop.people (id UUID, mail TEXT, tags TEXT[], profile JSONB, changed TIMESTAMPTZ)")
            row = "('0d9f1c2e-0000-4000-8000-00000000000%s', 'p%s@example.test', '{a,b}', '{\"x\": 1}', '2026-01-0%s 12:00:00+02')"
            connection.exec_driver_sql("INSERT INTO shop.people VALUES " + ", ".join(row % (number, number, number) for number in range(1, 4)))
        there.dispose()
        monkeypatch.setenv("PEOPLE", server.url.replace("postgresql:", "postgresql+pg8000:"))
        columns = {"id": "external_id", "mail": "email", "tags": "tags", "profile": "profile", "changed": "changed_at"}
        read = {"table": "people", "schema_name": "shop"}
        source = declare("people", kind="sql", connection={"url_env": "PEOPLE"}, contacts={"read": read, "map": columns, "cursor": "changed", "overlap": 60})
        first = sync(source)
        again = sync(source)
    finally:
        server.stop()
    assert (first.standing.counts["inserted"], first.standing.rejected) == (3, {})
    found = {key: json.loads(value) for key, value in contacts(engine)["p2@example.test"].items()}
    assert found == {"tags": ["a", "b"], "profile": {"x": 1}}
    assert (again.standing.counts["read"], again.standing.counts["unchanged"]) == (1, 1)


def test_a_table_or_column_that_is_gone_is_named(shop: tuple[sa.Engine, sa.Table], engine: sa.Engine, source: Source, sync: Sync) -> None:
    other, table = shop
    sync(source)
    with other.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE customers RENAME COLUMN mail TO e_mail")
    with pytest.raises(SourceError, match="no column 'mail'"):
        sync(source)
    table.drop(other)
    with pytest.raises(SourceError, match="table and columns"):
        sync(source)
    assert len(subscribed(engine)) == 50


def test_a_database_that_is_away_is_named_without_its_password(engine: sa.Engine, source: Source, sync: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_URL", "mysql+pymysql://shop:hush-hush@127.0.0.1:1/shop")
    with pytest.raises(SourceError, match="error 2003") as caught:
        sync(source)
    assert "hush" not in str(caught.value)
    monkeypatch.setenv("SHOP_URL", "mysql+nodriver://shop:hush-hush@127.0.0.1:1/shop")
    with pytest.raises(SourceError, match="nodriver; expected DIALECT"):
        sync(source)
