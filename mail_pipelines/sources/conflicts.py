"""Whose value of a field wins where the source and we differ."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.contacts.merging import Taken
from mail_pipelines.contacts.sets import slices
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import SourceContact
from mail_pipelines.sources.declaration import Rule
from mail_pipelines.sources.records import NEVER, Record


def taken(engine: Engine, source: str, rules: Mapping[str, Rule], by_hash: Mapping[bytes, Record]) -> Taken | None:
    """What of these records' values is taken over; None for everything.

    `newest` compares three versions: what differs since the last merge on one side only is that side's; on both, the later change wins.
    """
    if set(rules.values()) <= {"theirs"}:
        return None
    last: dict[bytes, tuple[dt.datetime | None, dt.datetime]] = {}
    if "newest" in rules.values():
        with reading(engine) as connection:
            for ids in slices(record.external_id for record in by_hash.values()):
                query = sa.select(SourceContact.address_hash, SourceContact.changed_at, SourceContact.merged_at)
                found = connection.execute(query.where(SourceContact.source == source, SourceContact.external_id.in_(ids)))
                last.update({digest: (changed_at, merged_at) for digest, changed_at, merged_at in found})

    def theirs_is_newer(digest: bytes, updated_at: dt.datetime) -> bool:
        record = by_hash.get(digest)
        theirs = record.changed_at if record else None
        before = last.get(digest)
        if before is not None and (theirs == before[0] or (theirs or NEVER) < (before[0] or NEVER)):
            return False
        if before is not None and updated_at <= before[1]:
            return True
        return theirs is not None and theirs > updated_at

    def wins(digest: bytes, updated_at: dt.datetime, stored: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        newer = theirs_is_newer(digest, updated_at)
        return {key: value for key, value in given.items() if stored.get(key) is None or rules[key] == "theirs" or (rules[key] == "newest" and newer)}

    return wins
