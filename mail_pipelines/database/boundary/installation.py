"""Making the servers' schema beside the central one, and giving its rights to accounts. The account that does it is the definer of all in it."""

from __future__ import annotations

import hashlib
import re

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.boundary.rights import IN_HAND, ME, VIEWS, View
from mail_pipelines.database.engine import is_mysql
from mail_pipelines.database.models import Server
from mail_pipelines.database.procedures import installation as procedures

# Which server calls is not for the caller to say.
_SERVER = "p_server_id"
_SECURITY = "SQL SECURITY DEFINER"


def schema_of(connection: Connection) -> str:
    """The name of the servers' schema."""
    return f"{connection.engine.url.database}_servers"


def exists(connection: Connection) -> bool:
    if not is_mysql(connection):
        return False
    query = sa.text("SELECT EXISTS (SELECT 1 FROM information_schema.schemata WHERE schema_name = :name)")
    return bool(connection.execute(query, {"name": schema_of(connection)}).scalar_one())


def install(connection: Connection) -> None:
    """Make the schema with its views and procedures, or bring it and the rights of all servers' accounts up to date."""
    own = _quoted(connection, schema_of(connection))
    _run(connection, f"CREATE DATABASE IF NOT EXISTS {own} CHARACTER SET utf8mb4")
    for view in VIEWS:
        check = " WITH CASCADED CHECK OPTION" if view.checked else ""
        _run(connection, f"CREATE OR REPLACE SQL SECURITY DEFINER VIEW {own}.{_quoted(connection, view.name)} AS {_query(connection, view)}{check}")
    there = _marks(connection)
    for name in procedures.names():
        text = _wrapper(connection, name)
        # Nobody can call it between the two: what is as it should be stays, for whoever is sending.
        if there.get(name) != (mark := _mark(connection, text)):
            _run(connection, f"DROP PROCEDURE IF EXISTS {own}.{name}")
            _run(connection, text.replace(_SECURITY, f"{_SECURITY} COMMENT '{mark}'"))

    # Who drops a procedure takes away the rights to it; and what is new nobody may use yet.
    for account in connection.execute(sa.select(Server.account).where(Server.account.is_not(None))).scalars().all():
        grant(connection, str(account))


def grant(connection: Connection, account: str) -> None:
    """Give an account all that a server may do."""
    own = _quoted(connection, schema_of(connection))
    for view in VIEWS:
        connection.exec_driver_sql(f"GRANT {view.rights} ON {own}.{_quoted(connection, view.name)} TO %s@'%%'", (account,))
    for name in procedures.names():
        connection.exec_driver_sql(f"GRANT EXECUTE ON PROCEDURE {own}.{name} TO %s@'%%'", (account,))


def _query(connection: Connection, view: View) -> str:
    in_hand = ", ".join(str(int(state)) for state in IN_HAND)
    return view.query.format(central=_central(connection), me=_me(connection), in_hand=in_hand)


def _me(connection: Connection) -> str:
    return ME.format(central=_central(connection))


def _wrapper(connection: Connection, name: str) -> str:
    """A procedure of the same name and parameters that calls the central one as the server whose account calls."""
    own = _quoted(connection, schema_of(connection))
    parameters = re.search(r"CREATE PROCEDURE \w+ \((.*?)\n\)", procedures.text(name), re.DOTALL)
    assert parameters is not None
    arguments = ", ".join(_me(connection) if argument == _SERVER else argument for argument in re.findall(r"\bp_\w+", parameters[1]))
    return f"CREATE PROCEDURE {own}.{name} ({parameters[1]})\n{_SECURITY}\nCALL {_central(connection)}.{name}({arguments})"


def _mark(connection: Connection, text: str) -> str:
    """What tells a procedure from every other one: its text, and whose rights it has."""
    definer = connection.exec_driver_sql("SELECT CURRENT_USER()").scalar_one()
    return hashlib.sha256(f"{definer}\n{text}".encode()).hexdigest()


def _marks(connection: Connection) -> dict[str, str]:
    """Those of the procedures that are there, by name; what was made before there were marks has another comment."""
    query = sa.text("SELECT routine_name AS name, routine_comment AS mark FROM information_schema.routines WHERE routine_schema = :schema")
    return {str(name): str(mark) for name, mark in connection.execute(query, {"schema": schema_of(connection)}).tuples()}


def _central(connection: Connection) -> str:
    return _quoted(connection, str(connection.engine.url.database))


def _quoted(connection: Connection, name: str) -> str:
    return connection.dialect.identifier_preparer.quote_identifier(name)


def _run(connection: Connection, statement: str) -> None:
    # Without parameters the driver leaves percent signs alone.
    connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
