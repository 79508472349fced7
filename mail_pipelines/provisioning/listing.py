"""Whether the addresses of servers are on block lists: looked up a few times a day, and remembered for whoever shows or tells it.

What belongs here: whose turn it is, and keeping what was found. What does not: the lists (`block_lists`), and draining a server (`capacity.health`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.config import DnsSettings
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import SyncState
from mail_pipelines.database.upsert import put
from mail_pipelines.dispatch.servers import ServerInfo
from mail_pipelines.provisioning import block_lists
from mail_pipelines.provisioning.block_lists import Look, Standing
from mail_pipelines.provisioning.dns.records import is_public

SOURCE = "block_lists"
# So many servers in one go: each is a question for each list, and a tick has to end.
AT_ONCE = 5
# A listing that would drain a server has to be seen twice; the second look comes so soon.
CONFIRM_AFTER = dt.timedelta(minutes=10)


@dataclass(frozen=True)
class Listing:
    """What lists said of a server at `at`: `listed` in words with what to do, `unknown` of lists that do not answer.

    `matters` are those of `listed` for which a server is drained, `since` when one was first seen.
    """

    at: dt.datetime
    listed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    matters: tuple[str, ...] = ()
    since: dt.datetime | None = None

    @property
    def confirmed(self) -> bool:
        """Whether two looks have found what matters."""
        return self.since is not None and self.at > self.since

    def is_due(self, now: dt.datetime, every: dt.timedelta) -> bool:
        return now - self.at >= (min(every, CONFIRM_AFTER) if self.matters and not self.confirmed else every)


def listings(connection: Connection) -> dict[str, Listing]:
    """What was found last, by server."""
    rows = connection.execute(sa.select(SyncState.key, SyncState.value).where(SyncState.source == SOURCE))
    return {key: _listing(value) for key, value in rows}


def _listing(value: dict[str, Any]) -> Listing:
    since = value.get("since")
    listed, unknown, matters = (tuple(value.get(name, ())) for name in ("listed", "unknown", "matters"))
    return Listing(dt.datetime.fromisoformat(value["at"]), listed, unknown, matters, None if since is None else dt.datetime.fromisoformat(since))


def look(engine: Engine, settings: DnsSettings, fleet: Iterable[ServerInfo], now: dt.datetime) -> dict[str, Listing]:
    """Look up the servers whose turn it is, those that wait longest first. No transaction is open meanwhile. Raises `ResolverError`.

    Only servers that have told a public address: what a name leads to may be somebody else's.
    """
    if not settings.block_list_hours:
        return {}
    with reading(engine) as connection:
        known = listings(connection)
    addresses = {server.key: [text for text in (server.health or {}).get("addresses", ()) if is_public(text)] for server in fleet}
    every = dt.timedelta(hours=settings.block_list_hours)
    due = [key for key in addresses if addresses[key] and (key not in known or known[key].is_due(now, every))]
    due = sorted(due, key=lambda key: known[key].at if key in known else dt.datetime.min.replace(tzinfo=dt.UTC))[:AT_ONCE]
    if not due:
        return {}
    looks = block_lists.look(settings, [address for key in due for address in addresses[key]], block_lists.block_lists())
    found = {key: of([look for look in looks if look.address in addresses[key]], known.get(key), now) for key in due}
    transact(engine, lambda connection: keep(connection, found))
    return found


def of(looks: Sequence[Look], before: Listing | None, now: dt.datetime) -> Listing:
    """What lists say now of the addresses of a server, of which `before` was known."""
    listed, unknown = (tuple(dict.fromkeys(look.text for look in looks if look.standing is standing)) for standing in (Standing.LISTED, Standing.UNKNOWN))
    matters = tuple(dict.fromkeys(look.text for look in looks if look.drains))
    since = before.since if before is not None else None
    # A list that does not answer has not taken the address off.
    return Listing(now, listed, unknown, matters, (since or now) if matters else since if unknown else None)


def keep(connection: Connection, found: Mapping[str, Listing]) -> None:
    """Remember what was found of these servers."""
    for key, listing in found.items():
        since = None if listing.since is None else listing.since.isoformat()
        value = asdict(listing) | {"at": listing.at.isoformat(), "since": since}
        put(connection, SyncState, [{"source": SOURCE, "key": key, "value": value, "version": 1, "changed_at": listing.at}])
