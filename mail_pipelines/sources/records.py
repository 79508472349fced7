"""Staged rows as records: which id each has at the source, which are marked as deleted, and what is wrong with the others."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mail_pipelines.contacts.addresses import Address, AddressError, parse
from mail_pipelines.sources.declaration import CHANGED_AT, CONSENT_AT, DELETED, EMAIL, EXTERNAL_ID, OPTED_IN, OPTED_OUT, Contacts
from mail_pipelines.sources.staging import POSITION
from mail_pipelines.sources.texts import is_false, is_marked, is_one_of, is_true, moment

if TYPE_CHECKING:
    import pyarrow as pa

ID_LENGTH = 190
NEVER = dt.datetime.min.replace(tzinfo=dt.UTC)


@dataclass(frozen=True)
class Record:
    """A row whose address can be used. `evidence` is the source's time of consent, as it writes it."""

    external_id: str
    address: Address
    changed_at: dt.datetime | None
    subscribes: bool
    evidence: str | None


def name_of(resource: Contacts, key: str) -> str:
    """The column that becomes `key`, for messages."""
    return resource.column_of(key) or key


def ids(resource: Contacts, rows: pa.Table) -> dict[int, str]:
    """Position → id at the source, of the rows that have a usable one."""
    positions = rows[POSITION].to_pylist()
    if resource.column_of(EXTERNAL_ID):
        return {position: text for position, text in zip(positions, rows[EXTERNAL_ID].to_pylist(), strict=True) if text and len(text) <= ID_LENGTH}
    found = {}
    for position, text in zip(positions, rows[EMAIL].to_pylist(), strict=True):
        try:
            found[position] = parse(text or "").hash.hex()
        except AddressError:
            continue
    return found


def deleted(resource: Contacts, rows: pa.Table) -> set[int]:
    """Positions of the rows that are marked as deleted."""
    if not resource.column_of(DELETED):
        return set()
    return {position for position, text in zip(rows[POSITION].to_pylist(), rows[DELETED].to_pylist(), strict=True) if is_marked(text)}


@dataclass(frozen=True)
class Noes:
    """Addresses (by hash) whose rows say no: who `left`, and who no longer says yes (`withdrawn`), which counts only for what the source itself subscribed."""

    left: set[bytes]
    withdrawn: set[bytes]


def noes(resource: Contacts, rows: pa.Table) -> Noes:
    """Who says no, also of rows that are no records: whatever else is wrong with a row, nobody is mailed against it."""
    found = Noes(set(), set())
    opted_in, opted_out = (rows[target].to_pylist() if resource.column_of(target) else None for target in (OPTED_IN, OPTED_OUT))
    if opted_in is None and opted_out is None:
        return found
    size = rows.num_rows
    for email, agreed, out in zip(rows[EMAIL].to_pylist(), opted_in or [None] * size, opted_out or [None] * size, strict=True):
        left = is_marked(out) or is_one_of(agreed, resource.consent.left)
        if left or is_false(agreed):
            try:
                (found.left if left else found.withdrawn).add(parse(email or "").hash)
            except AddressError:
                continue
    return found


def _agrees(resource: Contacts, text: str | None) -> bool:
    words = resource.consent.agreed
    return is_one_of(text, words) if words else is_true(text)


def usable(resource: Contacts, rows: pa.Table, ids: Mapping[int, str], deleted: Collection[int]) -> tuple[dict[int, Record], dict[int, str]]:
    """The records by position, and the reasons of the rows that are none."""
    records: dict[int, Record] = {}
    rejects: dict[int, str] = {}
    size = rows.num_rows

    def column(target: str) -> Sequence[str | None]:
        return rows[target].to_pylist() if resource.column_of(target) else [None] * size

    given = zip(rows[POSITION].to_pylist(), rows[EMAIL].to_pylist(), column(CHANGED_AT), column(OPTED_IN), column(CONSENT_AT), strict=True)
    for position, email, changed, opted_in, consent_at in given:
        if position in deleted:
            continue
        try:
            if not (email or "").strip():
                raise AddressError("", "there is none")
            address = parse(email)
        except AddressError as error:
            rejects[position] = f"address: {error.reason}"
            continue
        if position not in ids:
            rejects[position] = f"column {name_of(resource, EXTERNAL_ID)!r}: there is no id, or it is longer than {ID_LENGTH} characters"
            continue
        try:
            changed_at = moment(changed)
        except ValueError as error:
            rejects[position] = f"column {name_of(resource, CHANGED_AT)!r}: {error}"
            continue
        rule = resource.consent.subscribe
        subscribes = rule == "always" or (rule == "opted_in" and _agrees(resource, opted_in))
        records[position] = Record(ids[position], address, changed_at, subscribes, consent_at)
    return records, rejects


def drop_older(records: dict[int, Record]) -> int:
    """Of several rows of one record keep the newest, which is the record; returns how many went."""
    latest: dict[str, tuple[dt.datetime, int]] = {}
    for position, record in records.items():
        version = (record.changed_at or NEVER, position)
        latest[record.external_id] = max(latest.get(record.external_id, version), version)
    older = [position for position, record in records.items() if latest[record.external_id][1] != position]
    for position in older:
        del records[position]
    return len(older)
