"""A server's part of a recovery: what its own log says of every offer since the backup, put into the central database.

What belongs here: reading the log and telling whether it has everything. What does not: what follows for the ledger (`applying`).
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from sqlalchemy.engine import Engine

from mail_pipelines.config import Settings
from mail_pipelines.contacts.sets import slices
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import RecoveredOffer
from mail_pipelines.database.upsert import put
from mail_pipelines.delivery.events import mask_addresses
from mail_pipelines.dispatch import permit, servers, settlement, tail
from mail_pipelines.dispatch.claims import Memory, Sender
from mail_pipelines.dispatch.files import ServerFolders, boot_id
from mail_pipelines.dispatch.journal import Evidence, Journal, Kind, Outcome, Torn, UnknownForm, process_alive
from mail_pipelines.dispatch.own_lines import OwnLines
from mail_pipelines.dispatch.recovery import standing
from mail_pipelines.dispatch.recovery.standing import Part, ServerPart
from mail_pipelines.messages.keyring import KeyRing
from mail_pipelines.messages.tokens import TEST_CAMPAIGN, DeliveryToken, TokenError

# What a ledger that has forgotten it has to be told. Of the others nothing reached a destination.
TOLD = frozenset({Kind.DELIVERED, Kind.BOUNCED, Kind.DEFERRED, Kind.UNKNOWN})
# A log is read from so long before the last heartbeat that the restored database knows: what was logged earlier is in it.
OVERLAP = dt.timedelta(hours=1)
# The stamp at the front of every line of either kind of server, in UTC and without parts of seconds.
_STAMP = 19
_NO_OUTCOME = Outcome(Kind.UNKNOWN)


class Found(NamedTuple):
    """Damaged lines of a log, messages that are still at a destination, and ends of messages whose token is under no key that is accepted."""

    unreadable: int
    in_flight: int
    foreign: int = 0


# Offers by their token: the second in which the end of each was logged, and how it ended.
Offers = dict[DeliveryToken, tuple[int, Outcome]]


class Store:
    """Puts offers of a server into the database; `count` is how many."""

    def __init__(self, engine: Engine, server_id: int) -> None:
        self._engine = engine
        self._server_id = server_id
        self.count = 0

    def __call__(self, offers: Offers) -> None:
        for rows in slices(_rows(offers, self._server_id)):
            transact(self._engine, lambda connection, rows=rows: put(connection, RecoveredOffer, rows))  # type: ignore[misc]
        self.count += len(offers)


def take_part(engine: Engine, settings: Settings, server: servers.ServerInfo, sender: Sender, journal: Journal) -> bool:
    """Do what a recovery asks of this server; false if it has to be asked again, and may not send until then.

    A server that has contributed takes the new generation over when the recovery is finished. The claims that the restored database still
    has are settled before, from the same log.
    """
    folders = ServerFolders.of(settings.server, server.key)
    with reading(engine) as connection:
        found = standing.newest(connection)
    if found is None or servers.recall(engine, folders).generation == found.generation:
        return True
    part = found.of_server(server.id)
    if found.is_open and part is None:
        # Registered since the recovery began: what it has mailed is in no other log.
        transact(engine, lambda connection: standing.await_server(connection, found.generation, server.id))
    elif found.is_open and part is not None and part.part is Part.AWAITED:
        _contribute(engine, settings, server, sender, journal, found.generation, part)
    elif not found.is_open and part is not None and part.part in (Part.READ, Part.INCOMPLETE):
        servers.remember(folders, Memory(found.generation))
        return True
    return False


def _contribute(engine: Engine, settings: Settings, server: servers.ServerInfo, sender: Sender, journal: Journal, generation: str, part: ServerPart) -> None:
    """Read the log and write down what it says, unless a message is still at a destination."""
    folders = ServerFolders.of(settings.server, server.key)
    permit.revoke_all(folders.permits)
    settled = settlement.settle_all(engine, sender, folders, journal, settings.sending, settings.token_key(), wait_seconds=0)
    end = journal.end()
    now = time.time()
    if settled.waiting or tail.quiet_seconds(max(path.stat().st_mtime for _, path in journal.files()), now) < tail.LEFT_SECONDS:
        return
    store = Store(engine, server.id)
    since = part.heartbeat_at - OVERLAP if part.heartbeat_at else None
    keys = KeyRing([(server.id, settings.token_key())])
    found = read(server.key, journal, tail.blocks(journal, None, now), since, keys, store, shares=folders.shares is not None)
    if found.in_flight or journal.end() != end:
        # Whoever ended while the log was read may have written more.
        return
    note = missing(journal, part, folders.incarnation(), boot_id()) or foreign(found.foreign)
    result = Part.INCOMPLETE if note else Part.READ
    if found.unreadable:
        note = f"{note}{'; ' if note else ''}{found.unreadable} lines could not be read"
    transact(engine, lambda connection: standing.set_part(connection, generation, server.id, result, offers=store.count, note=note))


def missing(journal: Journal, part: ServerPart, incarnation: str, boot_id: str) -> str:
    """What the log may have lost since the backup; "" if nothing."""
    if part.incarnation is not None and part.incarnation != incarnation:
        return "the log folder was replaced"
    if part.boot_id is not None and part.boot_id != boot_id:
        return "the host was started again, which may have cost the last lines before"
    if part.journal_inode is not None and part.journal_inode not in [inode for inode, _ in journal.files()]:
        return "files of the log are gone"
    return ""


def foreign(count: int) -> str:
    """What a log lacks of which so many ends of messages cannot be told; "" if nothing."""
    return f"{count} messages are under another token key than its server's" if count else ""


def read(
    server: str,
    journal: Journal,
    blocks: Iterable[tail.Block],
    since: dt.datetime | None,
    keys: KeyRing,
    store: Callable[[Offers], None],
    *,
    shares: bool = False,
) -> Found:
    """Give `store` the ends of all offers of a server that were logged after `since` (None: all) in blocks of a log, which `journal` knows how to read.

    A later end of an offer takes the place of an earlier one. A damaged line hides an offer only if both its INTENT and its end are damaged.
    Tokens under no key of `keys` are left out, and counted. `shares` says whether the log is another server's, which this one shares.
    """
    evidence, own = Evidence(), OwnLines(server, shares=shares)
    started: dict[str, int] = {}
    begin = int(since.timestamp()) if since else 0
    second = unreadable = damaged_before = others = 0
    for block in blocks:
        offers: Offers = {}
        evidence.outcomes.clear()
        evidence.bad_lines, damaged_before = damaged_before, 0
        for start, _, entry, error in journal.read(block.data):
            second = _second(block.data[start : start + _STAMP], second)
            if isinstance(error, Torn):
                evidence.torn |= error.tokens
            elif error is not None and not isinstance(error, UnknownForm):
                damaged_before += 1
                evidence.bad_lines += 1
                unreadable += second >= begin
            for said in error.entries if isinstance(error, Torn) else (entry,) if entry is not None else ():
                if not own.has(said):
                    continue
                token = said.token or evidence.messages.get(said.message, "")
                if said.intent_pid is not None:
                    started[token] = second
                outcome = evidence.take(said)
                if outcome is not None and outcome.kind in TOLD and second >= begin:
                    others += not _note(offers, token, second, outcome, keys)
                if token not in evidence.intents:
                    started.pop(token, None)
        if offers:
            store(offers)
    without_end: Offers = {}
    for token in evidence.intents:
        if started[token] >= begin:
            others += not _note(without_end, token, started[token], _NO_OUTCOME, keys)
    store(without_end)
    return Found(unreadable, sum(map(process_alive, evidence.intents.values())), others)


def _note(offers: Offers, text: str, second: int, outcome: Outcome, keys: KeyRing) -> bool:
    """Whether the token can be read."""
    try:
        token, _ = keys.read_delivery(text)
    except TokenError:
        return False
    if token.campaign_id != TEST_CAMPAIGN:
        offers[token] = second, outcome
    return True


def _second(stamp: bytes, before: int) -> int:
    """The epoch second of a stamp; that of the line before if it is damaged."""
    try:
        return int(dt.datetime.fromisoformat(stamp.decode("ascii")).replace(tzinfo=dt.UTC).timestamp())
    except ValueError:
        return before


def _rows(offers: Offers, server_id: int) -> Iterator[dict[str, Any]]:
    """In key order, so that two writers wait for each other."""
    for token, (second, outcome) in sorted(offers.items(), key=lambda item: (item[0].campaign_id, item[0].contact_id, item[0].attempt)):
        yield {
            "campaign_id": token.campaign_id,
            "contact_id": token.contact_id,
            "attempt": token.attempt,
            "server_id": server_id,
            "kind": outcome.kind.value,
            "at": second,
            "code": outcome.code,
            "enhanced": outcome.enhanced,
            "text": mask_addresses(outcome.text)[:500] or None,
        }
