"""Staging: what was landed comes back as it was, in order, also where rows are sent as lines of CSV."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import sqlalchemy as sa

from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.database import lines
from mail_pipelines.database.engine import create_engine
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds import Wanted, sql
from mail_pipelines.sources.landing import _texts
from mail_pipelines.sources.staging import POSITION, Landing, open_staging

TEXTS = ['say "hi", twice ""', "two\nlines\r\n", "back\\slash \\N", "NULL", "  blanks  ", "ü 😀 例", "x" * 5_000, "'quoted'", "100 %s %", ",", None]


@pytest.mark.slow
@pytest.mark.parametrize("most_bytes", [2**30, 1_024])
def test_texts_come_back_as_they_were(engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_bytes: int) -> None:
    monkeypatch.setattr(lines, "_MOST_BYTES", most_bytes)
    with open_staging(engine, tmp_path, "crm", "contacts") as staging:
        landing = Landing(("email", "other"), None, "2026-01-01T00:00:00+00:00", 1)
        staging.begin(landing)
        given = pa.table(
            {POSITION: pa.array(range(len(TEXTS)), pa.int64()), "email": pa.array(TEXTS, pa.string()), "other": pa.array(TEXTS[::-1], pa.string())}
        )
        # Twice, as by a process that is killed while it lands.
        staging.write(given.slice(0, 4))
        staging.write(given)
        pages = list(staging.rows(landing, 4))
        assert [page.num_rows for page in pages] == [4, 4, 3]
        assert pa.concat_tables(pages).to_pylist() == given.to_pylist()
        staging.clear()


@pytest.mark.server
def test_the_account_of_the_centre_needs_the_rights_that_the_playbook_gives(mariadb: MariaDB, tmp_path: Path) -> None:
    url = mariadb.database()
    name = url.rpartition("/")[2]
    template = Path(__file__).parents[2] / "infra/ansible/roles/database/templates/accounts.sql.j2"
    given = next(line for line in template.read_text().splitlines() if r"`mail\_staging`" in line)
    with mariadb.connect() as connection, connection.cursor() as cursor:
        cursor.execute("CREATE USER staged@'127.0.0.1'")
        cursor.execute(f"GRANT ALL ON `{name}`.* TO staged@'127.0.0.1'")
    central = create_engine(sa.make_url(url).set(username="staged").render_as_string(hide_password=False))
    with pytest.raises(SourceError, match=r"GRANT ALL ON `?test_\d+_staging`?\.\* TO 'staged'"):
        open_staging(central, tmp_path, "crm", "contacts")
    escaped = name.replace("_", r"\_")
    with mariadb.connect() as connection, connection.cursor() as cursor:
        cursor.execute(given.replace(r"`mail\_staging`", rf"`{escaped}\_staging`").replace("mail@'%'", "staged@'127.0.0.1'"))
    with open_staging(central, tmp_path, "crm", "contacts") as staging:
        assert staging.landing() is None
    central.dispose()
    with mariadb.connect() as connection, connection.cursor() as cursor:
        cursor.execute("DROP USER staged@'127.0.0.1'")
        cursor.execute(f"DROP DATABASE {name}_staging")
    mariadb.drop(url)


@pytest.mark.server
def test_mariadb_is_read_as_lines_as_it_is_read_by_dlt(mariadb: MariaDB) -> None:
    url = mariadb.database()
    with mariadb.connect(url.rpartition("/")[2]) as connection, connection.cursor() as cursor:
        cursor.execute(
            "CREATE TABLE people (id INT PRIMARY KEY, mail VARCHAR(200), latin TEXT CHARACTER SET latin1,"
            " cyrillic TEXT CHARACTER SET cp1251 COLLATE cp1251_bin, spent DOUBLE, born DATE, vip BOOLEAN,"
            " tier ENUM('a', 'b'), changed DATETIME(6), seen TIMESTAMP NULL)"
        )
        row = "INSERT INTO people VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
        cursor.execute(row, (1, 'a"b,\n\\', "Müller", "Анна", 2.5, "1990-01-02", True, "a", "2026-01-02 03:04:05.250000", "2026-01-02 03:04:05"))
        cursor.execute(row, (2, "", "", None, 3, None, False, None, "2026-01-02 03:04:05", None))
        cursor.execute(row, (3, *[None] * 9))
    columns = ("id", "mail", "latin", "cyrillic", "spent", "born", "vip", "tier", "changed", "seen")
    wanted = Wanted(columns, None, None, lambda name: name)
    engine = sa.create_engine(url)
    table = sa.Table("people", sa.MetaData(), autoload_with=engine)
    found = [
        {name: [text or None for text in _texts(page, name).to_pylist()] for name in columns}
        for page in (next(sql._written(engine, sql._chosen(table, wanted))), next(sql._arrow(engine, sql.Read(table="people"), wanted)))
    ]
    # dlt gives a DOUBLE ten decimals.
    by_lines, by_dlt = ([text and float(text) for text in texts.pop("spent")] for texts in found)
    assert by_lines == by_dlt == [2.5, 3.0, None]
    assert found[0] == found[1]
    assert found[0]["latin"] == ["Müller", None, None]
    # One column, and nothing in its last row.
    with engine.connect() as reading:
        (page,) = lines.pages(reading, sa.select(lines.line([table.c.tier])).order_by(table.c.id), ["tier"], 10)
    assert page["tier"].to_pylist() == ["a", None, None]
    # The schema ends with the server: dlt's reader still has the table in use.
    engine.dispose()


@pytest.mark.server
def test_a_row_that_the_server_cannot_send_is_named(mariadb: MariaDB) -> None:
    url = mariadb.database()
    with mariadb.connect(url.rpartition("/")[2]) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE people (mail LONGTEXT, note LONGTEXT)")
        cursor.execute("INSERT INTO people SELECT REPEAT('x', @@max_allowed_packet * 0.7), REPEAT('y', @@max_allowed_packet * 0.7)")
    wanted = Wanted(("mail", "note"), None, None, lambda name: name)
    with pytest.raises(SourceError, match="longer than max_allowed_packet"):
        list(sql.rows(sql.Connection(url=url), sql.Read(table="people"), wanted))
    mariadb.drop(url)
