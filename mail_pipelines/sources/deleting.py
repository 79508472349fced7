"""Records that are gone at the source: counted first, believed only if they are few or somebody says so, then their subscriptions end."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.contacts import lists
from mail_pipelines.contacts.sets import slices
from mail_pipelines.database.bulk import CHUNK_ROWS
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import SourceContact
from mail_pipelines.sources.declaration import Contacts, Source
from mail_pipelines.sources.errors import GuardStopped
from mail_pipelines.sources.links import GONE, MISSING, PRESENT, end_subscriptions


def note_missing(engine: Engine, source: str, run: int) -> None:
    """After a whole reading: mark the records that it did not have."""
    query = (
        sa.select(SourceContact.external_id)
        .where(SourceContact.source == source, SourceContact.state == PRESENT, SourceContact.run < run)
        .order_by(SourceContact.external_id)
        .limit(CHUNK_ROWS)
    )
    while True:
        with reading(engine) as connection:
            ids = connection.execute(query).scalars().all()
        if not ids:
            return

        def work(connection: Connection, ids: Sequence[str] = ids) -> None:
            for some in slices(ids):
                mine = sa.and_(SourceContact.source == source, SourceContact.external_id.in_(some))
                connection.execute(sa.update(SourceContact).where(mine).values(state=MISSING))

        transact(engine, work)


def standing(engine: Engine, source: str) -> tuple[int, int]:
    """How many records are missing, and how many there were with them."""
    with reading(engine) as connection:
        query = sa.select(SourceContact.state, sa.func.count()).where(SourceContact.source == source).group_by(SourceContact.state)
        counts = dict(connection.execute(query).tuples().all())
    missing = counts.get(MISSING, 0)
    return missing, missing + counts.get(PRESENT, 0)


def carry_out(engine: Engine, source: Source, resource: Contacts, target: lists.MailingList | None, *, accept: bool, now: dt.datetime) -> int:
    """End the subscriptions of missing records; returns how many ended. Raises `GuardStopped`, having changed nothing, if they are too many."""
    rule = resource.deletions
    missing, known = standing(engine, source.name)
    is_everything = 0 < missing == known and rule.share < 1
    if (is_everything or missing > max(rule.at_least, rule.share * known)) and not accept:
        raise GuardStopped(
            f"{missing:,} of {known:,} records are gone at the source, more than {rule.share:.0%}: nothing was ended. If that is meant, run "
            f"`mail-pipelines source run {source.name} --accept-deletions`"
        )
    ended = 0
    query = sa.select(SourceContact.external_id, SourceContact.contact_id).where(SourceContact.source == source.name, SourceContact.state == MISSING)
    while True:
        with reading(engine) as connection:
            rows = connection.execute(query.order_by(SourceContact.external_id).limit(CHUNK_ROWS)).tuples().all()
        if not rows:
            return ended

        def work(connection: Connection, rows: Sequence[tuple[str, int]] = rows) -> int:
            ids, contact_ids = [row[0] for row in rows], {row[1] for row in rows}
            for some in slices(ids):
                mine = sa.and_(SourceContact.source == source.name, SourceContact.external_id.in_(some))
                connection.execute(sa.update(SourceContact).where(mine).values(state=GONE))
            return end_subscriptions(connection, source.name, contact_ids, target, now=now) if rule.then == "end" else 0

        ended += transact(engine, work)
