"""Schema migrations (Alembic): `upgrade` brings any database to the newest schema, `require_schema` refuses one that this version cannot work with."""

from __future__ import annotations

import datetime as dt
import functools
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines import __version__
from mail_pipelines.database.boundary import installation as boundary
from mail_pipelines.database.engine import DatabaseError, database_id, explained, reading, transact
from mail_pipelines.database.models import DEFAULT_POOL, Brand, LedgerGeneration, Pool
from mail_pipelines.database.procedures import installation

if TYPE_CHECKING:
    from alembic.config import Config

# In place of a revision: what was in this database is in another one now.
_MOVED = "moved"
_MIGRATIONS = Path(__file__).parent / "migrations"
# The centre is upgraded first, so its servers work for a while with a schema that is newer than they know. This is the oldest they may know. A migration that
# takes away or changes what they use sets it to its own number; one that only adds leaves it.
OLDEST = "0013"


class SchemaOutdated(DatabaseError):
    """This version does not work with the database's schema."""


def alembic_config(engine: Engine) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["engine"] = engine
    return config


def upgrade(engine: Engine) -> None:
    """Create or upgrade the schema, with the stored procedures and the rows every installation has.

    Raises `SchemaOutdated` for one that is newer than this version.
    """
    found = revision(engine)
    _require_here(found)
    if found is not None and found > newest_revision():
        raise SchemaOutdated(f"the central database is at schema {found}, which mail_pipelines {__version__} does not know: install the version that made it")
    if found != newest_revision():
        # Alembic loads all migrations before it finds that there is nothing to do.
        from alembic import command

        with explained(engine):
            command.upgrade(alembic_config(engine), "head")
    transact(engine, installation.install_missing)
    transact(engine, _renew_boundary)
    transact(engine, _seed)


def _renew_boundary(connection: Connection) -> None:
    """What the accounts of servers see follows the tables, where there are such accounts."""
    if boundary.exists(connection):
        boundary.install(connection)


def _seed(connection: Connection) -> None:
    now = dt.datetime.now(dt.UTC)
    for table, row in (
        (Brand, {"id": 1, "key": "default", "name": "Default", "postal_address": "", "created_at": now}),
        (Pool, {"id": DEFAULT_POOL, "key": "default", "overflow_pool_id": None}),
        (LedgerGeneration, {"id": 1, "generation": str(uuid.uuid4()), "created_at": now}),
    ):
        if connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() == 0:
            connection.execute(sa.insert(table).values(row))
    connection.execute(sa.update(LedgerGeneration).values(oldest_schema=OLDEST))
    remember_server(connection)


def remember_server(connection: Connection) -> None:
    """Write down which database server the ledger is on, unless that is known: `doctor` and every claim compare it."""
    connection.execute(sa.update(LedgerGeneration).where(LedgerGeneration.database_id.is_(None)).values(database_id=database_id(connection)))


def revision(engine: Engine) -> str | None:
    """The schema revision of the database, or None for an empty one."""
    with explained(engine), engine.connect() as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one_or_none()


@functools.cache
def newest_revision() -> str:
    """The newest schema: migrations are numbered, so a look at the folder tells it without loading Alembic on the send path.

    As this process first saw it: what is installed over it meanwhile, it does not know.
    """
    return max(path.name.partition("_")[0] for path in (_MIGRATIONS / "versions").glob("[0-9]*.py"))


def require_schema(engine: Engine) -> None:
    """Raise `SchemaOutdated` unless the database is at this version's revision, or at a newer one that this version may work with."""
    found, wanted = revision(engine), newest_revision()
    _require_here(found)
    if found is None:
        raise SchemaOutdated("the central database has no tables yet: run `mail-pipelines init`")
    if found < wanted:
        raise SchemaOutdated(f"the central database is at schema {found}, this version needs {wanted}: run `mail-pipelines database upgrade`")
    if found > wanted:
        with reading(engine) as connection:
            require_known(connection)


def require_known(connection: Connection) -> None:
    """Raise `SchemaOutdated` if the database needs a newer version than this one, as it may since an upgrade. The least that one asks who works on."""
    oldest, known = connection.execute(sa.select(LedgerGeneration.oldest_schema)).scalar_one(), newest_revision()
    if oldest > known:
        raise SchemaOutdated(
            f"mail_pipelines {__version__} is too old for the central database: it knows schema {known}, and the database needs {oldest} at least: "
            "install the version of the centre here"
        )


def mark_moved(connection: Connection) -> None:
    """From now on no process opens this database as the central one: what is in it went to another."""
    connection.execute(sa.text("UPDATE alembic_version SET version_num = :moved"), {"moved": _MOVED})


def is_moved(engine: Engine) -> bool:
    return revision(engine) == _MOVED


def _require_here(found: str | None) -> None:
    if found == _MOVED:
        raise SchemaOutdated("the central database was copied to another one with `mail-pipelines database copy`: database.url has to name that one")
