"""Staged rows of addresses that must not be mailed into suppressions. Only adds: what the source no longer says was said all the same."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.contacts import consent, lists
from mail_pipelines.contacts.addresses import AddressError, parse
from mail_pipelines.contacts.consent import ALL, Scope
from mail_pipelines.contacts.sets import slices
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Brand, Contact
from mail_pipelines.sources import refusals
from mail_pipelines.sources.declaration import EMAIL, REASON, Source, Suppressions
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.merging import Tally
from mail_pipelines.sources.staging import POSITION

if TYPE_CHECKING:
    import pyarrow as pa

REASONS = ("unsubscribe", "complaint", "bounce", "manual")


def scope_of(connection: Connection, resource: Suppressions, now: dt.datetime) -> Scope:
    """The scope that the declaration names; its list is made if there is none. Raises `SourceError` for an unknown brand."""
    kind, _, name = resource.scope.partition(" ")
    if kind == "brand":
        brand_id = connection.execute(sa.select(Brand.id).where(Brand.key == name)).scalar_one_or_none()
        if brand_id is None:
            raise SourceError(f"suppressions.scope: there is no brand {name!r}")
        return Scope("brand", brand_id)
    return Scope("list", lists.ensure(connection, name, now=now).id) if kind == "list" else ALL


def chunk(engine: Engine, source: Source, resource: Suppressions, scope: Scope, rows: pa.Table, tally: Tally, now: dt.datetime) -> list[tuple[str, str]]:
    """Merge at most `CHUNK_ROWS` rows; returns place and reason of those left out."""
    reasons = rows[REASON].to_pylist() if resource.column_of(REASON) else [None] * rows.num_rows
    by_reason: dict[str, dict[bytes, None]] = {}
    rejects: dict[int, str] = {}
    for position, email, given in zip(rows[POSITION].to_pylist(), rows[EMAIL].to_pylist(), reasons, strict=True):
        reason = (given or "").strip().lower() or resource.reason
        try:
            if not (email or "").strip():
                raise AddressError("", "there is none")
            digest = parse(email).hash
        except AddressError as error:
            rejects[position] = f"address: {error.reason}"
            continue
        # A word that we do not know still says that the address must not be mailed.
        by_reason.setdefault(reason if reason in REASONS else resource.reason, {})[digest] = None

    def work(connection: Connection) -> int:
        added = 0
        for reason, hashes in by_reason.items():
            added += consent.suppress(connection, list(hashes), reason=reason, scope_kind=scope.kind, scope_id=scope.id, now=now)
            if reason in consent.OWN_WORD:
                # Subscriptions end, too.
                for some in slices(hashes):
                    ids = connection.execute(sa.select(Contact.id).where(Contact.address_hash.in_(some))).scalars().all()
                    consent.unsubscribe(connection, ids, scope=scope.kind, scope_id=scope.id, now=now)
            if source.write_back:
                refusals.learned(connection, source.name, hashes, now)
        return added

    added = transact(engine, work)
    distinct = sum(map(len, by_reason.values()))
    tally.counts.update(read=rows.num_rows, inserted=added, unchanged=distinct - added, duplicates=rows.num_rows - len(rejects) - distinct)
    tally.rejected.update(rejects.values())
    return [(str(position), reason) for position, reason in sorted(rejects.items())]
