"""Whose value of a field wins where the source and we differ."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts.merging import Decision, Taken
from mail_pipelines.contacts.sets import slices
from mail_pipelines.database.models import SourceContact
from mail_pipelines.sources.declaration import Rule
from mail_pipelines.sources.records import NEVER

if TYPE_CHECKING:
    import pyarrow as pa


def taken(source: str, rules: Mapping[str, Rule], records: pa.Table) -> Taken | None:
    """What of these records' values (`external_id`, `address_hash`, `changed_at`, `leads`) is taken over; None for everything.

    `newest` compares three versions: what differs since the last merge on one side only is that side's; on both, the later change wins.
    """
    if set(rules.values()) <= {"theirs"}:
        return None

    def decision(connection: Connection, differing: Collection[bytes]) -> Decision:
        import pyarrow as pa
        import pyarrow.compute as pc

        theirs: dict[bytes, dt.datetime | None] = {}
        last: dict[bytes, tuple[dt.datetime | None, dt.datetime]] = {}
        if "newest" in rules.values():
            mine = records.filter(pc.and_(records["leads"], pc.is_in(records["address_hash"], value_set=pa.array(differing, pa.binary(16)))))
            times = (changed_at and changed_at.replace(tzinfo=dt.UTC) for changed_at in mine["changed_at"].to_pylist())
            theirs.update(zip(mine["address_hash"].to_pylist(), times, strict=True))
            # By its id: a record whose address has just changed was merged under another one.
            digests = dict(zip(mine["external_id"].to_pylist(), mine["address_hash"].to_pylist(), strict=True))
            for ids in slices(digests):
                query = sa.select(SourceContact.external_id, SourceContact.changed_at, SourceContact.merged_at)
                found = connection.execute(query.where(SourceContact.source == source, SourceContact.external_id.in_(ids)))
                last.update({digests[external_id]: (changed_at, merged_at) for external_id, changed_at, merged_at in found})

        def wins(digest: bytes, updated_at: dt.datetime, stored: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
            newer = _is_newer(theirs.get(digest), last.get(digest), updated_at)
            return {key: value for key, value in given.items() if stored.get(key) is None or rules[key] == "theirs" or (rules[key] == "newest" and newer)}

        return wins

    return decision


def _is_newer(theirs: dt.datetime | None, before: tuple[dt.datetime | None, dt.datetime] | None, updated_at: dt.datetime) -> bool:
    """Whether the source's version is; `before` are its time and ours when it was merged last."""
    if before is not None and (theirs == before[0] or (theirs or NEVER) < (before[0] or NEVER)):
        return False
    if before is not None and updated_at <= before[1]:
        return True
    return theirs is not None and theirs > updated_at
