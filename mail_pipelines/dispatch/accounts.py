"""Database accounts of dispatch servers: each has one, which may do what `database.boundary` lists and is known to the database as that server.

What belongs here: making an account, giving it another password, when a server may get a token key of its own, and ending it with all that the server
has in hand. What does not: what an account may do, and the server's account at the broker (`resources.broker_accounts`).
"""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database.boundary import installation as boundary
from mail_pipelines.database.engine import explained, is_mysql, transact
from mail_pipelines.database.models import Server
from mail_pipelines.dispatch import registry, servers, token_keys
from mail_pipelines.dispatch.files import DispatchError
from mail_pipelines.dispatch.token_keys import InUse
from mail_pipelines.domains import store
from mail_pipelines.messages.keyring import derive

# MySQL takes names of 32 characters.
_LONGEST_SCHEMA = 21
_CANNOT_CREATE = 1396
_NO_SUCH_CONNECTION = 1094
_LOCK_SECONDS = 120
_NO_RIGHTS = {1044, 1142, 1227, 1370, 1410}


class AccountError(DispatchError):
    """A server's account cannot be made or ended as asked."""


@dataclass(frozen=True)
class Account:
    """What a server connects with: `url` without the password."""

    server: str
    url: str
    password: str


class KeyHeld(AccountError):
    """A server cannot be given a token key of its own while it may have claims under the one that it has."""


@dataclass(frozen=True)
class Revoked:
    """What the end of a server's accounts did: recipients that became unknown, and the DNS records of its own DKIM keys, which are to be removed."""

    unknown: int
    records: tuple[str, ...]


def give(engine: Engine, key: str, before: Callable[[], None] = lambda: None) -> Account:
    """Make the account of a server, or give it a new password; sessions that are connected go on. Raises `AccountError`.

    `before` is called when there is an account and nothing is left to do but to change its password, which stays as it is if that fails.
    """
    if not is_mysql(engine):
        raise AccountError("a central database in SQLite has no accounts: they are for dispatch servers on other hosts (docs/production.md)")
    password = secrets.token_urlsafe(32)
    with explained(engine), _administration(engine) as connection:
        server = servers.find(connection, key)
        account = _name(engine, server.id)
        try:
            boundary.install(connection)
            # As the centre's own connection is: a password is worth nothing on a line that others read.
            demand = "REQUIRE SSL" if _is_encrypted(connection) else "REQUIRE NONE"
            is_new = _account(connection, server.id) is None
            if is_new:
                connection.exec_driver_sql(f"CREATE USER %s@'%%' IDENTIFIED BY %s {demand}", (account, password))
            boundary.grant(connection, account)
            connection.execute(sa.update(Server).where(Server.id == server.id).values(account=account))
            before()
            if not is_new:
                connection.exec_driver_sql(f"ALTER USER %s@'%%' IDENTIFIED BY %s {demand}", (account, password))
        except sa.exc.DBAPIError as error:
            raise _explained(error, engine, account) from error
        central = engine.url
        url = sa.URL.create(central.drivername, account, None, central.host, central.port, boundary.schema_of(connection), central.query)
    return Account(key, url.render_as_string(), password)


def token_key_of(engine: Engine, key: str, token_key: bytes) -> bytes:
    """The token key of a server's own, derived from the installation's; its own DKIM keys are sealed for it. Raises `KeyHeld`.

    A server that works under another one has to be at rest: what it has in hand is named in its log by tokens that it could no longer read.
    """

    def work(connection: Connection) -> bytes:
        server = servers.find(connection, key)
        at_rest = server.heartbeat_at is None or not server.sends
        if token_keys.in_use(server, token_key) is not InUse.OWN and not (at_rest and registry.open_claims(connection, server.id) == 0):
            raise KeyHeld(
                f"server {key} works under another token key: `mail-pipelines server drain {key}`, and when `mail-pipelines server show {key}` says that it is "
                "drained, repeat this for a key of its own"
            )
        store.reseal_keys_of(connection, server.id, key, token_key)
        return derive(token_key, key)

    return transact(engine, work)


def revoke(engine: Engine, key: str, now: dt.datetime) -> Revoked:
    """End a server for good: its account, its connections, its DKIM keys; what it has in hand becomes unknown. May be repeated."""

    def work(connection: Connection) -> tuple[servers.ServerInfo, tuple[str, ...]]:
        server = servers.find(connection, key)
        # From here on the account is nobody's, whatever it has open.
        connection.execute(sa.update(Server).where(Server.id == server.id).values(account=None))
        return server, store.retire_keys_of(connection, server.id, now)

    server, records = transact(engine, work)
    unknown = 0 if server.state == registry.ServerState.RETIRED else registry.retire_lost(engine, key)
    if is_mysql(engine):
        _drop(engine, _name(engine, server.id))
    return Revoked(unknown, records)


def _drop(engine: Engine, account: str) -> None:
    """End an account and its connections, if there are any: what they have locked would stay so."""
    with explained(engine), _administration(engine) as connection:
        try:
            connection.exec_driver_sql("DROP USER IF EXISTS %s@'%%'", (account,))
            for number in connection.exec_driver_sql("SELECT id FROM information_schema.processlist WHERE user = %s", (account,)).scalars().all():
                _kill(connection, number)
        except sa.exc.DBAPIError as error:
            raise _explained(error, engine, account) from error


def _kill(connection: Connection, number: int) -> None:
    """End a connection; one that has ended by itself is as good."""
    try:
        connection.exec_driver_sql("KILL %s", (number,))
    except sa.exc.DBAPIError as error:
        if _code(error) != _NO_SUCH_CONNECTION:
            raise


def _name(engine: Engine, server_id: int) -> str:
    """The name of a server's account: that of the schema keeps installations in one database server apart."""
    return f"{str(engine.url.database)[:_LONGEST_SCHEMA]}-{server_id}"


@contextmanager
def _administration(engine: Engine) -> Iterator[Connection]:
    """A connection for statements that no transaction can hold: whoever makes or ends accounts waits for who is doing it. Raises `AccountError`."""
    name = f"{str(engine.url.database)[:_LONGEST_SCHEMA]} accounts"
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if connection.exec_driver_sql("SELECT GET_LOCK(%s, %s)", (name, _LOCK_SECONDS)).scalar_one() != 1:
            raise AccountError(f"somebody else has been at the accounts of servers for {_LOCK_SECONDS} s: repeat this later")
        try:
            yield connection
        except BaseException:
            # It may be the connection that broke, and another error at it would hide the first. Closed, it has no lock.
            connection.invalidate()
            raise
        # The connection itself is kept for others.
        connection.exec_driver_sql("SELECT RELEASE_LOCK(%s)", (name,))


def _account(connection: Connection, server_id: int) -> str | None:
    return connection.execute(sa.select(Server.account).where(Server.id == server_id)).scalar_one()


def _is_encrypted(connection: Connection) -> bool:
    return bool(connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Ssl_cipher'").one()[1])


def _code(error: sa.exc.DBAPIError) -> object:
    return getattr(error.orig, "args", (None,))[0]


def _explained(error: sa.exc.DBAPIError, engine: Engine, account: str) -> Exception:
    code = _code(error)
    if code == _CANNOT_CREATE:
        return AccountError(f"the database has an account {account} that is not known here: drop it if no other installation uses it, then repeat this")
    if code in _NO_RIGHTS:
        return AccountError(
            f"the account of the centre may not do this ({error.orig.args[1] if error.orig else code}): it needs all rights on {engine.url.database} and "
            f"{engine.url.database}_servers with grant option, and CREATE USER, PROCESS and CONNECTION ADMIN (docs/production.md)"
        )
    return error
