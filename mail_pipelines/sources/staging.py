"""Where the rows of sources wait until they are merged: one table a section, of texts, outside the central tables.

On MariaDB/MySQL it is a schema of its own beside the central one (`<schema>_staging`), on SQLite a file of its own, so that landing a million rows
keeps nobody from the central database. All columns are text: a source that changes a column's type cannot stop the landing, and whether a value fits its
field is decided, and said, row by row in the merge. A table lives from a landing to the end of its merge; then nobody's data is left in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database import bulk, lines
from mail_pipelines.database.engine import create_engine, is_mysql, reading, transact
from mail_pipelines.database.types import LongText, ascii_string
from mail_pipelines.sources.errors import SourceError

if TYPE_CHECKING:
    import pyarrow as pa

POSITION = "position"
SUFFIX = "_staging"
FILE_SUFFIX = ".staging.sqlite3"
_DENIED = {1044, 1045, 1142, 1227}
_OPTIONS: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mariadb_engine": "InnoDB", "mariadb_charset": "utf8mb4"}
_LANDINGS = sa.Table(
    "landings",
    sa.MetaData(),
    sa.Column("name", ascii_string(64), primary_key=True),
    sa.Column("value", LongText, nullable=False),
    **_OPTIONS,
)


@dataclass(frozen=True)
class Landing:
    """What is in a staging table: by which columns and request it was read, and how far it is landed and merged. Survives a killed run."""

    columns: tuple[str, ...]
    since: str | None
    begun_at: str
    run: int
    complete: bool = False
    merged_to: int = -1
    counts: dict[str, int] | None = None
    rejected: dict[str, int] | None = None
    highest: str | None = None


class Staging:
    """The staging area of one section of a source."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.dispose()

    def landing(self) -> Landing | None:
        with reading(self.engine) as connection:
            value = connection.execute(sa.select(_LANDINGS.c.value).where(_LANDINGS.c.name == self.name)).scalar_one_or_none()
        return None if value is None else _landing(value)

    def begin(self, landing: Landing) -> None:
        """An empty table for a new landing."""
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") if is_mysql(self.engine) else self.engine.begin() as connection:
            self._table(landing.columns).drop(connection, checkfirst=True)
            self._table(landing.columns).create(connection)
        self.note(landing)

    def note(self, landing: Landing) -> None:
        value = json.dumps(landing.__dict__)

        def work(connection: Connection) -> None:
            connection.execute(sa.delete(_LANDINGS).where(_LANDINGS.c.name == self.name))
            connection.execute(sa.insert(_LANDINGS), {"name": self.name, "value": value})

        transact(self.engine, work)

    def write(self, rows: pa.Table) -> None:
        """Add rows with `position` and texts; those that are in already stay."""
        import pyarrow.compute as pc

        names = [name for name in rows.column_names if name != POSITION]
        table = self._table(names)
        for name in names:
            rows = rows.set_column(rows.column_names.index(name), name, pc.fill_null(rows[name], ""))
        transact(self.engine, lambda connection: bulk.load(connection, table, rows, ignore_duplicates=True))

    def rows(self, landing: Landing, size: int) -> Iterator[pa.Table]:
        """What is not merged yet, in order, at most `size` rows at once."""
        after = landing.merged_to
        while (found := self._rows_after(self._table(landing.columns), after, size)).num_rows:
            yield found
            after = found[POSITION][-1].as_py()

    def _rows_after(self, table: sa.Table, after: int, size: int) -> pa.Table:
        import pyarrow as pa

        position, names = table.c[POSITION], [column.name for column in table.c]
        schema = pa.schema([(name, pa.int64() if name == POSITION else pa.string()) for name in names])

        def chosen(*columns: sa.ColumnElement[Any]) -> sa.Select[Any]:
            return sa.select(*columns).where(position > after).order_by(position).limit(size)

        with reading(self.engine) as connection:
            if is_mysql(connection):
                columns = [table.c[name] for name in names[1:]]
                if (rows := lines.at_once(connection, sa.select().where(position > after, position <= after + size), columns, position)) is not None:
                    return rows
                page = next(lines.pages(connection, chosen(lines.line(list(table.c))), names, size), None)
                return schema.empty_table() if page is None else page.cast(schema)
            found = connection.execute(chosen(position, *(sa.func.nullif(table.c[name], "") for name in names[1:]))).all()
        return pa.table(list(zip(*found, strict=True)), schema=schema) if found else schema.empty_table()

    def clear(self) -> None:
        """Forget the landing and its rows."""
        transact(self.engine, lambda connection: connection.execute(sa.delete(_LANDINGS).where(_LANDINGS.c.name == self.name)))
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") if is_mysql(self.engine) else self.engine.begin() as connection:
            sa.Table(self.name, sa.MetaData()).drop(connection, checkfirst=True)
        if not is_mysql(self.engine):
            self._shrink()

    def _shrink(self) -> None:
        """What was dropped stays in the pages of an SQLite file, which never becomes smaller by itself."""
        raw = self.engine.raw_connection()
        try:
            for statement in ("VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
                raw.cursor().execute(statement)
        finally:
            raw.close()

    def _table(self, columns: Iterable[str]) -> sa.Table:
        # Nothing is an empty text: a NULL costs the database more to load.
        columns_of_text: list[sa.Column[Any]] = [sa.Column(name, LongText, nullable=False) for name in columns]
        return sa.Table(self.name, sa.MetaData(), sa.Column(POSITION, sa.BigInteger, primary_key=True, autoincrement=False), *columns_of_text, **_OPTIONS)


def area_name(source: str, section: str) -> str:
    """The name of a section's table, and of its folder of packages."""
    return f"{source}_{section}".replace("-", "_")


def open_staging(central: Engine, folder: Path, source: str, section: str) -> Staging:
    """The staging area of a section. Raises `SourceError` if it cannot be made, with the statement that permits it."""
    name = area_name(source, section)
    if not is_mysql(central):
        engine = create_engine(f"sqlite:///{folder / source}{FILE_SUFFIX}")
    else:
        schema = schema_of(central)
        quoted = central.dialect.identifier_preparer.quote(schema)
        try:
            with central.connect() as connection:
                connection.exec_driver_sql(f"CREATE DATABASE IF NOT EXISTS {quoted} CHARACTER SET utf8mb4")
        except sa.exc.DBAPIError as error:
            if error.orig is not None and error.orig.args and error.orig.args[0] in _DENIED:
                user = central.url.username
                raise SourceError(f"no staging schema: as an administrator of the database run GRANT ALL ON {quoted}.* TO {user!r}@'…'") from error
            raise
        engine = engine_of(central)
    with engine.begin() as connection:
        _LANDINGS.create(connection, checkfirst=True)
    return Staging(engine, name)


def landings(engine: Engine) -> dict[str, Landing]:
    """What stands in a staging area, by table."""
    with reading(engine) as connection:
        return {name: _landing(value) for name, value in connection.execute(sa.select(_LANDINGS.c.name, _LANDINGS.c.value)).tuples()}


def _landing(value: str) -> Landing:
    document = json.loads(value)
    return Landing(**document | {"columns": tuple(document["columns"])})


def schema_of(central: Engine) -> str:
    """The schema of all staging tables, beside a central database on MariaDB."""
    return f"{central.url.database}{SUFFIX}"


def engine_of(central: Engine) -> Engine:
    """An engine for that schema; the caller disposes of it."""
    return create_engine(central.url.set(database=schema_of(central)).render_as_string(hide_password=False))
