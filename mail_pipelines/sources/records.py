"""Staged rows as records: which id each has at the source, which are marked as deleted, and what is wrong with the others. By column, not by row."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mail_pipelines.contacts import address_columns
from mail_pipelines.sources import texts
from mail_pipelines.sources.declaration import CHANGED_AT, CONSENT_AT, DELETED, EMAIL, EXTERNAL_ID, OPTED_IN, OPTED_OUT, Consent, Contacts
from mail_pipelines.sources.staging import POSITION

if TYPE_CHECKING:
    import pyarrow as pa

ID_LENGTH = 190
NEVER = dt.datetime.min.replace(tzinfo=dt.UTC)


@dataclass(frozen=True)
class Noes:
    """Addresses (by hash) whose rows say no: who `left`, and who no longer says yes (`withdrawn`), which counts only for what the source itself subscribed.

    `left_ids` are the ids of the rows of who left: where one has no usable address any more, or somebody else's, that is how its person is known.
    """

    left: set[bytes]
    withdrawn: set[bytes]
    left_ids: set[str]


@dataclass(frozen=True)
class Records:
    """What a chunk of staged rows says, in their order.

    `ids` has the id of each row at the source, null where there is no usable one; `deleted` whether it is marked as that. `usable` has a row for each
    record: `position`, `external_id`, the columns of `address_columns`, `changed_at` (UTC without zone), `subscribes`, and `consent_at` as the source
    writes it. `noes` are also of rows that are no records: whatever else is wrong with one, nobody is mailed against it. `rejects` are positions and reasons
    of the rows that are none; `older` counts those that a newer version of the same record took the place of.
    """

    ids: pa.Array
    deleted: pa.Array
    usable: pa.Table
    noes: Noes
    rejects: dict[int, str]
    older: int


def name_of(resource: Contacts, key: str) -> str:
    """The column that becomes `key`, for messages."""
    return resource.column_of(key) or key


def read(resource: Contacts, rows: pa.Table) -> Records:
    """The records of staged rows; `rows` has `position` and a text column for each target of the mapping."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def column(target: str) -> pa.Array:
        return rows[target].combine_chunks() if resource.column_of(target) else pa.nulls(rows.num_rows, pa.string())

    addresses, unusable = address_columns.encode(column(EMAIL))
    ids = _usable_ids(column(EXTERNAL_ID)) if resource.column_of(EXTERNAL_ID) else _hexadecimal(addresses["address_hash"])
    deleted = texts.that(texts.is_marked, column(DELETED))
    changed_at, undated = texts.moments(column(CHANGED_AT))
    left, withdrawn = _noes(resource.consent, column(OPTED_IN), column(OPTED_OUT))
    said_left, said_no = (set(addresses["address_hash"].filter(saying).drop_null().to_pylist()) for saying in (left, withdrawn))
    noes = Noes(said_left, said_no, set(ids.filter(left).drop_null().to_pylist()))
    # Two records may have one address: a no of one of them is the person's.
    no = pc.is_in(addresses["address_hash"], value_set=pa.array([*noes.left, *noes.withdrawn], pa.binary(16)))
    subscribes = pc.and_(_yeses(resource.consent, column(OPTED_IN)), pc.invert(no))
    # Of several reasons that of the address, then that of the id.
    reasons = {row: f"column {name_of(resource, CHANGED_AT)!r}: {reason}" for row, reason in undated.items()}
    without_id = f"column {name_of(resource, EXTERNAL_ID)!r}: there is no id, or it is longer than {ID_LENGTH} characters"
    reasons |= dict.fromkeys(pc.indices_nonzero(pc.is_null(ids)).to_pylist(), without_id)
    reasons |= {row: f"address: {reason}" for row, reason in unusable.items()}
    gone = set(pc.indices_nonzero(deleted).to_pylist())
    positions = rows[POSITION].combine_chunks()
    given = pa.table(
        {
            POSITION: positions,
            EXTERNAL_ID: ids,
            **{name: addresses[name] for name in address_columns.NAMES},
            CHANGED_AT: changed_at,
            "subscribes": subscribes,
            CONSENT_AT: column(CONSENT_AT),
        }
    )
    usable = given.take(pa.array([row for row in range(rows.num_rows) if row not in reasons and row not in gone], pa.int64()))
    latest = _latest(usable)
    rejects = {positions[row].as_py(): reason for row, reason in reasons.items() if row not in gone}
    return Records(ids, deleted, latest, noes, rejects, usable.num_rows - latest.num_rows)


def _yeses(consent: Consent, opted_in: pa.Array) -> pa.Array:
    """Of each row whether it may be subscribed."""
    import pyarrow as pa

    if consent.subscribe != "opted_in":
        return pa.repeat(consent.subscribe == "always", len(opted_in))
    return texts.that(lambda text: texts.is_one_of(text, consent.agreed) if consent.agreed else texts.is_true(text), opted_in)


def _noes(consent: Consent, opted_in: pa.Array, opted_out: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Of each row whether its person left, and whether it takes back a yes."""
    import pyarrow.compute as pc

    left = pc.or_(texts.that(texts.is_marked, opted_out), texts.that(lambda text: texts.is_one_of(text, consent.left), opted_in))
    return left, pc.and_(texts.that(texts.is_false, opted_in), pc.invert(left))


def _usable_ids(ids: pa.Array) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    size = pc.utf8_length(ids)
    return pc.if_else(pc.and_(pc.greater(size, 0), pc.less_equal(size, ID_LENGTH)), ids, pa.scalar(None, pa.string()))


def _hexadecimal(hashes: pa.ChunkedArray) -> pa.Array:
    import pyarrow as pa

    return pa.array([digest and digest.hex() for digest in hashes.to_pylist()], pa.string())


def _latest(usable: pa.Table) -> pa.Table:
    """Of several rows of one record the newest, which is the record."""
    import pyarrow as pa

    ids = usable[EXTERNAL_ID].to_pylist()
    if len(set(ids)) == len(ids):
        return usable
    latest: dict[str, tuple[dt.datetime, int]] = {}
    for row, (id_, changed_at) in enumerate(zip(ids, usable[CHANGED_AT].to_pylist(), strict=True)):
        version = (changed_at or dt.datetime.min, row)
        latest[id_] = max(latest.get(id_, version), version)
    return usable.take(pa.array(sorted(row for _, row in latest.values()), pa.int64()))
