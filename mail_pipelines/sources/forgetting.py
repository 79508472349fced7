"""What was told and no feed comes back to is forgotten at night, and so are dead letters that nobody has sent again.

What people refused stays in the outbox for good, told or dead: all of it is looked at again each day, and what is not in the outbox would be told. Of a source
that is not read nothing goes: it goes on where it was.
"""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.database import pruning
from mail_pipelines.database.models import SyncDeadLetter, SyncOutbox
from mail_pipelines.sources import feeds, outbox, status

# So long is there to send them again; the asset's check warns all the while.
KEEP_DEAD_LETTERS = dt.timedelta(days=90)


def prune(engine: Engine, now: dt.datetime) -> dict[str, int]:
    """Delete what is old, in bounded transactions; returns the number of rows by table. May be killed at any moment, while sources are told."""
    row, letter = SyncOutbox, SyncDeadLetter
    old = letter.at < now - KEEP_DEAD_LETTERS
    # With its letter, not before and not after: one that waits is told, and one that is read again was not told.
    given_up = sa.exists().where(letter.source == row.source, letter.kind == row.kind, letter.event_id == row.event_id, old)
    over = sa.or_(row.state == outbox.TOLD, sa.and_(row.state == outbox.DEAD, given_up))
    forgotten = 0
    for source, told, position in status.positions(engine):
        kind = feeds.FEEDS[told].kind
        if position.read_at is not None and kind in feeds.KEPT:
            past = sa.and_(row.source == source, row.kind == kind, row.recorded_at < position.read_at - feeds.KEPT[kind])
            forgotten += pruning.delete(engine, row, (row.source, row.kind, row.event_id), sa.and_(past, over))
    letters = pruning.delete(engine, letter, (letter.source, letter.kind, letter.event_id), old)
    return {"sync_outbox": forgotten, "sync_dead_letters": letters}
