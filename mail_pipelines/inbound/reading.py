"""Reading what has come back: from files to evidence in the database, and the files put away.

What belongs here: the order of the steps, and counting. What does not: each of the steps.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.engine import Engine

from mail_pipelines.config import Settings
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.delivery import evidence
from mail_pipelines.delivery.evidence import Effect, Evidence
from mail_pipelines.delivery.ledger_archive import LedgerArchive
from mail_pipelines.dispatch import token_keys
from mail_pipelines.dispatch.files import only_one
from mail_pipelines.inbound import mailbox, maildir, reports
from mail_pipelines.inbound.folders import InboundFolders
from mail_pipelines.inbound.maildir import Waiting
from mail_pipelines.inbound.reports import Ignored
from mail_pipelines.messages.keyring import KeyRing

# So many messages of each maildir are read in one go; the rest waits for the next.
MESSAGES_AT_ONCE = 20_000


@dataclass
class Report:
    """How many messages of each kind were read: `new` by kind of evidence, others by what was done with them instead."""

    fetched: int = 0
    new: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    bad: int = 0

    def numbers(self) -> dict[str, int]:
        """By plain names, only what is not zero."""
        counts = {"fetched": self.fetched, "bad": self.bad} | self.new | self.others | {f"ignored_{name}": count for name, count in self.ignored.items()}
        return {name: count for name, count in counts.items() if count}


def files_wait(settings: Settings) -> bool:
    """Whether a message waits in one of the maildirs."""
    return any(map(maildir.any_waiting, InboundFolders.of(settings.inbound).maildirs()))


def read(engine: Engine, settings: Settings, now: dt.datetime) -> Report:
    """Read all messages that wait, each once. A killed call may be repeated.

    A message about something that a server has in hand, or whose row is in an archive that is away, waits for the next call. Raises
    `AlreadyRunning` if another process reads, and `MailboxError` if the IMAP mailbox cannot be polled, after the maildirs have been read.
    """
    folders, report = InboundFolders.of(settings.inbound), Report()
    with only_one(folders.lock, "reading inbound mail"):
        try:
            if settings.inbound.imap_url:
                report.fetched = mailbox.fetch(settings.inbound, folders.mail / "mailbox")
        finally:
            archive = LedgerArchive(settings.campaigns.archive)
            with reading(engine) as connection:
                keys = token_keys.accepted(connection, settings.token_key())
            for folder in folders.maildirs():
                _read_maildir(engine, folder, keys, now, report, archive)
                maildir.prune(folder, now - dt.timedelta(days=settings.inbound.keep_days))
    return report


def _read_maildir(engine: Engine, folder: Path, keys: KeyRing, now: dt.datetime, report: Report, archive: LedgerArchive) -> None:
    messages = maildir.waiting(folder, MESSAGES_AT_ONCE)
    for start in range(0, len(messages), evidence.BATCH):
        found = [(message, piece) for message in messages[start : start + evidence.BATCH] if (piece := _piece(message, keys, report)) is not None]
        if not found:
            continue
        pieces = [piece for _, piece in found]
        effects = transact(engine, lambda connection, pieces=pieces: evidence.apply(connection, pieces, now, archive))  # type: ignore[misc]
        for (message, piece), effect in zip(found, effects, strict=True):
            if effect is Effect.NEW:
                report.new[piece.kind.value] += 1
            else:
                report.others[effect.value] += 1
            if effect not in (Effect.TOO_EARLY, Effect.ARCHIVE_AWAY):
                message.finish()


def _piece(message: Waiting, keys: KeyRing, report: Report) -> Evidence | None:
    """What a message proves; one that proves nothing, or cannot be read, is put away and counted."""
    try:
        piece = reports.read(message.read(reports.READ_OCTETS), keys, message.at)
    except Exception as error:  # noqa: BLE001 (Python's parser fails on hostile bytes in ways that nobody lists, and the rest has to be read)
        message.put_aside(f"{type(error).__name__}: {error}")
        report.bad += 1
        return None
    if isinstance(piece, Ignored):
        message.finish()
        report.ignored[piece.value] += 1
        return None
    return piece
