"""Which servers have which token key: those that the centre accepts, and the one that each server says it works with.

What belongs here: the keys of registered servers, by the database. What does not: how keys are derived and tokens read (`messages.keyring`).
"""

from __future__ import annotations

import enum
from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.models import Server
from mail_pipelines.dispatch.servers import ServerInfo, all_servers
from mail_pipelines.messages.keyring import KeyRing, derive
from mail_pipelines.messages.tokens import fingerprint

# By this name a heartbeat tells the fingerprint of the key that its server works with.
FACT = "token_key"


class InUse(enum.StrEnum):
    """The token key that a server works with, by its last heartbeat."""

    OWN = "its own"
    INSTALLATION = "the installation's"
    FOREIGN = "none of this installation"
    # It never said so.
    UNTOLD = ""


def names(connection: Connection) -> dict[int, str]:
    """All servers that there ever were, by id: links and return paths of what they mailed stay good after they are retired or revoked."""
    return dict(connection.execute(sa.select(Server.id, Server.key)).tuples().all())


def accepted(connection: Connection, token_key: bytes) -> KeyRing:
    """Every key that the centre accepts tokens under."""
    return KeyRing.of(token_key, names(connection))


def remote(connection: Connection) -> list[ServerInfo]:
    """The servers on hosts of their own, those with an account of the database, until they retire: a lost one may come back. Only at the centre."""
    with_account = set(connection.execute(sa.select(Server.id).where(Server.account.is_not(None))).scalars())
    return [server for server in all_servers(connection) if server.id in with_account and server.state != "retired"]


def in_use(server: ServerInfo, token_key: bytes) -> InUse:
    """Which key a server says it has; `token_key` is the installation's."""
    told = (server.health or {}).get(FACT)
    if not isinstance(told, str):
        return InUse.UNTOLD
    known = {fingerprint(token_key): InUse.INSTALLATION, fingerprint(derive(token_key, server.key)): InUse.OWN}
    return known.get(told, InUse.FOREIGN)


def with_own(servers: Collection[ServerInfo], token_key: bytes) -> list[ServerInfo]:
    """Those that work with a key of their own, and so cannot open what is sealed under the installation's."""
    return [server for server in servers if in_use(server, token_key) is InUse.OWN]
