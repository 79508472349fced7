"""Whether the addresses of servers are on block lists: looked up a few times a day, and remembered for whoever shows or tells it.

What belongs here: whose turn it is, and keeping what was found. What does not: the lists (`block_lists`), and stopping a server, which is the operator's
decision.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.config import DnsSettings
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import SyncState
from mail_pipelines.dispatch.servers import ServerInfo
from mail_pipelines.provisioning import block_lists
from mail_pipelines.provisioning.block_lists import Standing
from mail_pipelines.provisioning.dns.records import is_public

SOURCE = "block_lists"
# So many servers in one go: each is a question for each list, and a tick has to end.
AT_ONCE = 5


@dataclass(frozen=True)
class Listing:
    """What lists said of a server at `at`: `listed` in words with what to do, `unknown` of lists that do not answer."""

    at: dt.datetime
    listed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def listings(connection: Connection) -> dict[str, Listing]:
    """What was found last, by server."""
    rows = connection.execute(sa.select(SyncState.key, SyncState.value).where(SyncState.source == SOURCE))
    return {key: Listing(dt.datetime.fromisoformat(value["at"]), tuple(value["listed"]), tuple(value["unknown"])) for key, value in rows}


def look(engine: Engine, settings: DnsSettings, fleet: Iterable[ServerInfo], now: dt.datetime) -> dict[str, Listing]:
    """Look up the servers whose turn it is, those that wait longest first. No transaction is open meanwhile. Raises `ResolverError`.

    Only servers that have told a public address: what a name leads to may be somebody else's.
    """
    if not settings.block_list_hours:
        return {}
    with reading(engine) as connection:
        known = listings(connection)
    addresses = {server.key: [text for text in (server.health or {}).get("addresses", ()) if is_public(text)] for server in fleet}
    due = [key for key in addresses if addresses[key] and (key not in known or now - known[key].at >= dt.timedelta(hours=settings.block_list_hours))]
    due = sorted(due, key=lambda key: known[key].at if key in known else dt.datetime.min.replace(tzinfo=dt.UTC))[:AT_ONCE]
    if not due:
        return {}
    looks = block_lists.look(settings, [address for key in due for address in addresses[key]], block_lists.block_lists())
    found = {}
    for key in due:
        own = [look for look in looks if look.address in addresses[key]]
        listed, unknown = (tuple(dict.fromkeys(look.text for look in own if look.standing is standing)) for standing in (Standing.LISTED, Standing.UNKNOWN))
        found[key] = Listing(now, listed, unknown)
    transact(engine, lambda connection: keep(connection, found))
    return found


def keep(connection: Connection, found: Mapping[str, Listing]) -> None:
    """Remember what was found of these servers."""
    for key, listing in found.items():
        values = {"value": asdict(listing) | {"at": listing.at.isoformat()}, "version": 1, "changed_at": listing.at}
        mine = (SyncState.source == SOURCE, SyncState.key == key)
        if not connection.execute(sa.update(SyncState).where(*mine).values(**values)).rowcount:
            connection.execute(sa.insert(SyncState).values(source=SOURCE, key=key, **values))
