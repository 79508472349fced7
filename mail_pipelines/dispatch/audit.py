"""The audit of one server's journal against the ledger, from where the last audit ended: what a session or settler missed comes to light here.

What belongs here: folding lines into outcomes, comparing them with the ledger in sets, applying those that end a doubt, and remembering
how far the journal has been read. What does not: finding the next lines (`tail`), their meaning (the parsers), and changing rows
(`delivery.resolving`).

The place is kept in the central database, not beside the log: a database that was restored goes back to an earlier place as well, and so
reads again what it has forgotten. Reading a line twice changes nothing in the ledger.
"""

from __future__ import annotations

import datetime as dt
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.config import Settings
from mail_pipelines.contacts.sets import slices
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Campaign, CampaignCounter, State, SyncState
from mail_pipelines.database.views import ledger_rows
from mail_pipelines.delivery import evidence, resolving
from mail_pipelines.delivery.classes import classify
from mail_pipelines.delivery.evidence import Effect, Evidence
from mail_pipelines.delivery.ledger_archive import LedgerArchive
from mail_pipelines.delivery.recording import Result
from mail_pipelines.dispatch import greylisting, tail
from mail_pipelines.dispatch.files import DispatchError, ServerFolders, only_one
from mail_pipelines.dispatch.journal import Evidence as JournalEvidence
from mail_pipelines.dispatch.journal import Journal, Kind, Outcome, Position, Torn, UnknownForm, process_alive
from mail_pipelines.dispatch.own_lines import OwnLines
from mail_pipelines.dispatch.servers import ServerInfo
from mail_pipelines.dispatch.settlement import result_of
from mail_pipelines.messages.tokens import TEST_CAMPAIGN, DeliveryToken, TokenError, read_delivery, sign_delivery

SOURCE = "journal"
# Date, hour and minute at the front of every line of either kind of server.
_MINUTE = 16
# The place is written down after so many blocks (of about 1 MB): a killed audit repeats no more.
_BLOCKS_A_SAVE = 32
# Of each form of disagreement so many messages are named; all are counted.
NAMED = 100
# More than all sessions of a server can have claimed.
_MOST_IN_HAND = 20_000
# More messages than are in all queues of a server.
_MESSAGES_KEPT = 5_000
_ASIDE_LINES = 10_000
_ASIDE_BYTES = 2_000
# Unknown rows of live campaigns that this server has recorded and nobody else has ended.
_DOUBTS = (
    sa.select(sa.func.coalesce(sa.func.sum(CampaignCounter.count), 0))
    .join(Campaign, Campaign.id == CampaignCounter.campaign_id)
    .where(
        Campaign.state.in_(("sending", "paused", "cancelled")),
        CampaignCounter.server_id == sa.bindparam("server"),
        CampaignCounter.state == int(State.UNKNOWN),
    )
)
_JOURNAL = resolving.Source("journal")
_ledger = ledger_rows.c
# No destination has said anything about the message, so there is nothing to hold against the ledger.
_NO_ANSWER = (Kind.VOID, Kind.UNKNOWN, Kind.UNREACHABLE)
# A late deferral is not among them: its row waits for the next attempt.
_PROVES = {State.DELIVERED: evidence.Kind.LATE_DELIVERY, State.BOUNCED: evidence.Kind.LATE_REFUSAL}
# What a deferral under the row's own attempt may have become: a cancelled campaign takes nothing back.
_AFTER_DEFERRAL = (State.CANCELLED, State.UNRESOLVED)


@dataclass(frozen=True)
class Standing:
    """How far a server's journal has been audited, and what all audits together have counted.

    `intents` are offers without an end at that place: token → id of the mail server's process; `messages` the mail server's own names of messages
    that were queued before it, with their tokens. `in_hand` are outcomes whose rows somebody
    else was about to record: they are held against the ledger once more. `others` are the claims and the messages of other servers that share the log.
    """

    incarnation: str = ""
    position: Position | None = None
    intents: Mapping[str, int] = field(default_factory=dict)
    messages: Mapping[str, str] = field(default_factory=dict)
    in_hand: Mapping[str, Outcome] = field(default_factory=dict)
    totals: Mapping[str, int] = field(default_factory=dict)
    audited_at: dt.datetime | None = None
    last_alarm_at: dt.datetime | None = None
    version: int = 0
    others: tuple[Sequence[str], Sequence[str]] = ((), ())


@dataclass
class Audit:
    """What one audit has found. `outcomes` counts lines by kind, `per_minute` the same by (minute as `2026-11-24 12:15`, kind).

    `gaps`: times that lines were gone before they were read. `foreign`: outcomes under a token that is not ours. `resolved` and `completed`:
    rows whose doubt ended, and bounces that got their words. `disagreements`: form → messages as campaign/contact/attempt.
    """

    server: str
    lines: int = 0
    outcomes: Counter[Kind] = field(default_factory=Counter)
    bad_lines: int = 0
    unknown_forms: int = 0
    alarms: int = 0
    gaps: int = 0
    foreign: int = 0
    resolved: Counter[State] = field(default_factory=Counter)
    completed: int = 0
    per_minute: Counter[tuple[str, Kind]] = field(default_factory=Counter)
    disagreeing: Counter[str] = field(default_factory=Counter)
    disagreements: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def numbers(self) -> dict[str, int]:
        """All counts by name."""
        plain = ("lines", "bad_lines", "unknown_forms", "alarms", "gaps", "foreign", "completed")
        counts = {name: getattr(self, name) for name in plain} | {"resolved": self.resolved.total(), "disagreements": self.disagreeing.total()}
        return counts | {kind.value: self.outcomes[kind] for kind in Kind}


# --- how far --------------------------------------------------------------------------------------------------------


def standings(connection: Connection) -> dict[str, Standing]:
    """The standing of every server that was audited, by its key."""
    rows = connection.execute(sa.select(SyncState.key, SyncState.value, SyncState.version).where(SyncState.source == SOURCE))
    return {row.key: _standing(row.value, row.version) for row in rows}


def _standing(value: Any, version: int) -> Standing:
    times = {name: dt.datetime.fromisoformat(value[name]) if value[name] else None for name in ("audited_at", "last_alarm_at")}
    position = Position(**value["position"]) if value["position"] else None
    in_hand = {token: Outcome(Kind(kind), *rest) for token, (kind, *rest) in value["in_hand"].items()}
    before = value["intents"], value.get("messages", {}), in_hand
    others = value.get("others", ((), ()))
    return Standing(value["incarnation"], position, *before, value["totals"], times["audited_at"], times["last_alarm_at"], version, others)


def _save(engine: Engine, key: str, standing: Standing, now: dt.datetime) -> Standing:
    """Write the standing over the version it was made from. Raises `DispatchError` if that is not the newest."""
    value = {
        "incarnation": standing.incarnation,
        "position": asdict(standing.position) if standing.position else None,
        "intents": dict(standing.intents),
        "messages": dict(standing.messages),
        "in_hand": {token: list(outcome) for token, outcome in standing.in_hand.items()},
        "totals": dict(standing.totals),
        "audited_at": standing.audited_at.isoformat() if standing.audited_at else None,
        "last_alarm_at": standing.last_alarm_at.isoformat() if standing.last_alarm_at else None,
        "others": standing.others,
    }
    values = {"value": value, "version": standing.version + 1, "changed_at": now}

    def work(connection: Connection) -> bool:
        mine = (SyncState.source == SOURCE, SyncState.key == key)
        if standing.version:
            return connection.execute(sa.update(SyncState).where(*mine, SyncState.version == standing.version).values(**values)).rowcount == 1
        if connection.execute(sa.select(SyncState.version).where(*mine)).first() is not None:
            return False
        connection.execute(sa.insert(SyncState).values(source=SOURCE, key=key, **values))
        return True

    if not transact(engine, work):
        raise DispatchError(f"another audit of {key} has gone on meanwhile; this one stops")
    return replace(standing, version=standing.version + 1)


def unread(server: ServerInfo, standing: Standing | None) -> bool:
    """Whether the journal, as the server's last heartbeat told its end, has anything that was not audited."""
    end = (server.health or {}).get("journal")
    if not end or not end[1]:
        return False
    return standing is None or standing.position is None or [standing.position.inode, standing.position.offset] != end


# --- the audit ------------------------------------------------------------------------------------------------------


def run(engine: Engine, settings: Settings, server: ServerInfo, journal: Journal, now: dt.datetime) -> Audit:
    """Read the journal of a server of this host from the audited place to its end, compare it with the ledger, and end doubts.

    `now` is this host's time, which with the dates of the files tells what is whole. What is written is dated by the database.
    Raises `AlreadyRunning` if the server is being audited, `DispatchError` if it has no journal here. A killed audit goes on at its last
    saved place.
    """
    folders = ServerFolders.of(settings.server, server.key)
    journal.end()
    with only_one(folders.log / "audit.lock", f"the audit of {server.key}"):
        with reading(engine) as connection:
            standing = standings(connection).get(server.key, Standing())
        if standing.incarnation != folders.incarnation():
            standing = replace(standing, incarnation=folders.incarnation(), position=None, intents={}, messages={}, in_hand={}, others=((), ()))
        return _Auditor(engine, settings, server, journal, folders, standing, now).run()


@dataclass
class LateLines:
    """Ends doubts of a server within seconds: it reads on while rows are unknown by its doing, and nothing otherwise.

    The place is kept in memory. What it misses the audit finds; it keeps no line aside and counts nothing.
    """

    engine: Engine
    settings: Settings
    server: ServerInfo
    journal: Journal
    folders: ServerFolders

    def __post_init__(self) -> None:
        self._standing = Standing(position=self.journal.end())

    def look(self, now: dt.datetime) -> Counter[State]:
        """Read what came since the last look; returns how many rows became what. `now` is this host's time."""
        with reading(self.engine) as connection:
            doubtful = connection.execute(_DOUBTS, {"server": self.server.id}).scalar_one() > 0
        if not doubtful:
            self._standing = Standing(position=self.journal.end())
            return Counter()
        reader = _Auditor(self.engine, self.settings, self.server, self.journal, self.folders, self._standing, now, keeps=False)
        found = reader.run()
        self._standing = reader.standing
        return found.resolved


@dataclass
class _Auditor:
    """One reading at work; `keeps` says whether its place, its numbers and the lines to be looked at are kept."""

    engine: Engine
    settings: Settings
    server: ServerInfo
    journal: Journal
    folders: ServerFolders
    standing: Standing
    now: dt.datetime
    keeps: bool = True

    def __post_init__(self) -> None:
        self.found = Audit(self.server.key)
        self.intents, self.messages = dict(self.standing.intents), dict(self.standing.messages)
        self.own = OwnLines(self.server.key, *self.standing.others, shares=self.folders.shares is not None)
        self.torn: set[str] = set()
        # Of `found.bad_lines`, those that may hide anything.
        self.hiding = 0
        self.in_hand: dict[str, Outcome] = {}
        self.totals = Counter(self.standing.totals)
        self.counted: dict[str, int] = {}
        self.token_key = self.settings.token_key()
        self.aside = _Aside(self.folders.log / "set-aside.log")

    def run(self) -> Audit:
        with reading(self.engine) as connection:
            self.at = database_now(connection)
        # Whoever was gone before the reading began has written all that it ever will.
        self._compare(self.standing.in_hand)
        gone = {token: pid for token, pid in self.intents.items() if not process_alive(pid)}
        for number, block in enumerate(tail.blocks(self.journal, self.standing.position, self.now.timestamp()), 1):
            self.found.gaps += block.gap
            self.found.lines += block.data.count(b"\n")
            self._compare(self._fold(block))
            self.standing = replace(self.standing, position=block.end)
            if number % _BLOCKS_A_SAVE == 0:
                self._save()
        self.intents = {token: pid for token, pid in self.intents.items() if gone.get(token) != pid}
        self._save()
        return self.found

    def _save(self) -> None:
        others = (self.own.claims, self.own.messages)
        standing = replace(self.standing, intents=self.intents, messages=self.messages, in_hand=self.in_hand, others=others)
        if not self.keeps:
            self.standing = standing
            return
        numbers = self.found.numbers()
        self.totals.update({name: count - self.counted.get(name, 0) for name, count in numbers.items()})
        alarm = self.at if numbers["alarms"] > self.counted.get("alarms", 0) else self.standing.last_alarm_at
        self.counted = numbers
        standing = replace(standing, totals=self.totals, audited_at=self.at, last_alarm_at=alarm)
        self.standing = _save(self.engine, self.server.key, standing, self.at)

    def _fold(self, block: tail.Block) -> dict[str, Outcome]:
        """The outcomes that stand at the end of the block; what cannot be read, or alarms, is counted and kept aside."""
        found = JournalEvidence(intents=self.intents, messages=self.messages, torn=self.torn)
        per_minute, data = self.found.per_minute, block.data
        minutes: Counter[tuple[bytes, Kind]] = Counter()
        for start, end, entry, error in self.journal.read(data):
            if entry is None:
                self._set_aside(block, start, end, error)
                if isinstance(error, Torn):
                    self.torn |= error.tokens
                    for own in error.entries:
                        if self.own.has(own) and own.token:
                            found.take(own)
            elif entry.alarm:
                self.found.alarms += 1
                self._keep_aside(block, start, end, "alarm")
            elif self.own.has(entry):
                found.bad_lines = self.hiding
                if (outcome := found.take(entry)) is not None:
                    minutes[data[start : start + _MINUTE], outcome.kind] += 1
                    if entry.early and outcome.kind is Kind.DEFERRED:
                        # Where the body went out before this reading began, it would end a doubt that stands.
                        found.outcomes.pop(entry.token or self.messages[entry.message])
        for (minute, kind), count in minutes.items():
            per_minute[minute.decode("ascii", "replace"), kind] += count
            self.found.outcomes[kind] += count
        # Of older ones nothing more is said.
        for message in list(self.messages)[:-_MESSAGES_KEPT]:
            del self.messages[message]
        return found.outcomes

    def _set_aside(self, block: tail.Block, start: int, end: int, error: ValueError | None) -> None:
        if isinstance(error, UnknownForm):
            self.found.unknown_forms += 1
            self._keep_aside(block, start, end, "unknown form")
        else:
            self.found.bad_lines += 1
            self.hiding += not isinstance(error, Torn)
            self._keep_aside(block, start, end, "bad")

    def _keep_aside(self, block: tail.Block, start: int, end: int, why: str) -> None:
        if self.keeps:
            self.aside.keep(block, start, end, why)

    # --- against the ledger ---

    def _compare(self, endings: Mapping[str, Outcome]) -> None:
        """Hold outcomes against the ledger: deliveries are only counted there, in sets, unless the count is wrong."""
        delivered: defaultdict[tuple[int, int], dict[int, Outcome]] = defaultdict(dict)
        others: defaultdict[int, list[tuple[DeliveryToken, Outcome]]] = defaultdict(list)
        for text, outcome in endings.items():
            if outcome.kind in _NO_ANSWER:
                continue
            try:
                token = read_delivery(text, self.token_key)
            except TokenError:
                self.found.foreign += 1
                continue
            if token.campaign_id == TEST_CAMPAIGN:
                continue
            if outcome.kind is Kind.DELIVERED:
                delivered[token.campaign_id, token.attempt][token.contact_id] = outcome
            else:
                others[token.campaign_id].append((token, outcome))
        with reading(self.engine) as connection:
            for (campaign_id, attempt), messages in delivered.items():
                for contact_ids in slices(messages):
                    if _delivered(connection, campaign_id, attempt, contact_ids) != len(contact_ids):
                        others[campaign_id] += [(DeliveryToken(campaign_id, number, attempt), messages[number]) for number in contact_ids]
        for campaign_id, known in others.items():
            for some in slices(known):
                self._judge(campaign_id, some)

    def _judge(self, campaign_id: int, known: Sequence[tuple[DeliveryToken, Outcome]]) -> None:
        """Hold each of some outcomes of a campaign against its row, end doubts, and note what does not agree."""
        with reading(self.engine) as connection:
            if connection.execute(sa.select(Campaign.state).where(Campaign.id == campaign_id)).scalar_one_or_none() == evidence.ARCHIVED:
                # It was held against the ledger when that was here.
                return
            columns = (_ledger.contact_id, _ledger.state, _ledger.attempt, _ledger.provider)
            ours = (_ledger.campaign_id == campaign_id, _ledger.contact_id.in_(sorted({token.contact_id for token, _ in known})))
            rows = {row.contact_id: row for row in connection.execute(sa.select(*columns).where(*ours))}
        doubts: list[Result] = []
        bounces: list[Result] = []
        for token, outcome in known:
            row = rows.get(token.contact_id)
            if row is None:
                self._disagree(token, outcome, "no row")
                continue
            if outcome.kind is Kind.DEFERRED and classify(row.provider, outcome.code, outcome.enhanced, outcome.text).reason == greylisting.REASON:
                # Later offers carry the same token: of these it says nothing.
                continue
            state, same_attempt = State(row.state), row.attempt == token.attempt
            if state is State.CLAIMED:
                # Somebody else is about to record the outcome.
                if len(self.in_hand) < _MOST_IN_HAND:
                    self.in_hand[sign_delivery(token, self.token_key)] = outcome
                continue
            if state is State.UNKNOWN and same_attempt:
                doubts.append(self._result(token, outcome, row.provider))
            elif state is State.BOUNCED and same_attempt and outcome.kind is Kind.BOUNCED:
                bounces.append(self._result(token, outcome, row.provider))
            elif not _agrees(outcome.kind, state, row.attempt - token.attempt):
                self._disagree(token, outcome, state.name.lower())
        self._change(campaign_id, doubts, bounces)

    def _change(self, campaign_id: int, doubts: list[Result], bounces: list[Result]) -> None:
        known = [result for result in doubts if result.state in _PROVES]
        open_again = [result for result in doubts if result.state not in _PROVES]
        pieces = [
            Evidence(_PROVES[result.state], campaign_id, result.contact_id, result.attempt, self.at, result.code, result.enhanced, result.text)
            for result in known
        ]

        archive = LedgerArchive(self.settings.campaigns.archive)

        def work(connection: Connection) -> tuple[Counter[State], int]:
            effects = [effect for part in slices(pieces) for effect in evidence.apply(connection, part, self.at, archive)]
            resolved = Counter(result.state for result, effect in zip(known, effects, strict=True) if effect is Effect.NEW)
            if open_again:
                resolved += resolving.resolve(connection, campaign_id, self.server.id, open_again, _JOURNAL, self.at)
            return resolved, resolving.complete(connection, campaign_id, self.server.id, bounces, self.at) if bounces else 0

        if doubts or bounces:
            resolved, completed = transact(self.engine, work)
            self.found.resolved += resolved
            self.found.completed += completed

    def _result(self, token: DeliveryToken, outcome: Outcome, provider: str) -> Result:
        return result_of(token, outcome, provider, self.settings.sending, self.at.timestamp())

    def _disagree(self, token: DeliveryToken, outcome: Outcome, ledger: str) -> None:
        form = f"{outcome.kind} in the log, {ledger} in the ledger"
        self.found.disagreeing[form] += 1
        if len(self.found.disagreements[form]) < NAMED:
            self.found.disagreements[form].append(f"{token.campaign_id}/{token.contact_id}/{token.attempt}")


def _delivered(connection: Connection, campaign_id: int, attempt: int, contact_ids: Sequence[int]) -> int:
    """How many of these are delivered by this attempt."""
    ours = (_ledger.campaign_id == campaign_id, _ledger.contact_id.in_(contact_ids))
    query = sa.select(sa.func.count()).where(*ours, _ledger.state == int(State.DELIVERED), _ledger.attempt == attempt)
    return connection.execute(query).scalar_one()


def _agrees(kind: Kind, state: State, later_attempts: int) -> bool:
    """Whether a row may be in `state` after an outcome of `kind`, with so many attempts counted since."""
    if kind is Kind.DEFERRED:
        return later_attempts > 0 or (later_attempts == 0 and state in _AFTER_DEFERRAL)
    return later_attempts == 0 and state is (State.DELIVERED if kind is Kind.DELIVERED else State.BOUNCED)


class _Aside:
    """The file beside the journal with the lines that somebody has to look at, each with its place, once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: set[str] | None = None

    def keep(self, block: tail.Block, start: int, end: int, why: str) -> None:
        if self._places is None:
            self._places = set(_places(self._path))
        place = f"{block.start.inode}:{block.start.offset + start}"
        if place in self._places or len(self._places) >= _ASIDE_LINES:
            return
        self._places.add(place)
        text = block.data[start : min(end, start + _ASIDE_BYTES)].rstrip(b"\n").decode("utf-8", "backslashreplace")
        with os.fdopen(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", encoding="utf-8") as file:
            file.write(json.dumps({"place": place, "why": why, "line": text}) + "\n")


def _places(path: Path) -> Iterator[str]:
    try:
        lines: Iterable[str] = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield json.loads(line)["place"]
        except (ValueError, KeyError):
            # Torn by a kill.
            continue
