"""Prepared rows into contacts, subscriptions and the change feed, in one transaction of set-based statements.

The rows go to a temporary table; what they change is decided on both sides: the database compares texts, so that a file
imported again costs one join, and rows that differ are merged here, because the databases' own JSON functions disagree.
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.contacts import changes
from mail_pipelines.contacts.sets import insert_if_absent, slices
from mail_pipelines.database import bulk
from mail_pipelines.database.engine import is_mysql, transact
from mail_pipelines.database.models import Contact, Subscription, Suppression
from mail_pipelines.database.types import Hash16, LongText, ascii_string

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
_COLLISIONS = 5
_temporary = sa.MetaData()
_NOTHING_NEW = 0
_CONTACTS = Contact.metadata.tables[Contact.__tablename__]
_COPIED = ["email", "address", "address_hash", "domain", "provider", "time_zone", "attributes", "consent"]
# One row a contact: `line` is its place in the file, `repeated` says that the file had the address before. `attributes` is JSON
# text in the layout of `json.dumps`. A `time_zone` of NULL says nothing. `consent` is JSON text that a contact
# begins with; rows may come without the column. The database finds `contact_id`: NULL for a contact to be made,
# `_NOTHING_NEW` for a row that changes nothing, else the contact to be changed.
STAGED = sa.Table(
    "staged_contacts",
    _temporary,
    sa.Column("line", sa.BigInteger, nullable=False),
    sa.Column("repeated", sa.Boolean, nullable=False),
    sa.Column("email", sa.String(254), nullable=False),
    sa.Column("address", sa.String(254), nullable=False),
    sa.Column("address_hash", Hash16, nullable=False),
    sa.Column("domain", ascii_string(253), nullable=False),
    sa.Column("provider", ascii_string(32), nullable=False),
    sa.Column("time_zone", ascii_string(48)),
    sa.Column("attributes", LongText, nullable=False),
    sa.Column("consent", LongText),
    sa.Column("contact_id", sa.BigInteger),
    prefixes=["TEMPORARY"],
    mysql_engine="InnoDB",
    mysql_charset="utf8mb4",
    mariadb_engine="InnoDB",
    mariadb_charset="utf8mb4",
)
_UPDATES = sa.Table(
    "staged_updates",
    _temporary,
    sa.Column("contact_id", sa.BigInteger, nullable=False),
    sa.Column("email", sa.String(254), nullable=False),
    sa.Column("time_zone", ascii_string(48)),
    sa.Column("attributes", LongText, nullable=False),
    prefixes=["TEMPORARY"],
    mysql_engine="InnoDB",
    mysql_charset="utf8mb4",
    mariadb_engine="InnoDB",
    mariadb_charset="utf8mb4",
)


@dataclass(frozen=True)
class Outcome:
    """What became of the rows, repeated ones not counted in `updated` and `unchanged`. `erased` are the lines of those left out."""

    inserted: int
    updated: int
    unchanged: int
    erased: frozenset[int]


# What of the given values is taken: by address hash, when the contact was last changed, its values and those given.
# A pure function of fields by key, with `email` (the address as it was spelled) and `time_zone` among them.
Decision = Callable[[bytes, dt.datetime, dict[str, Any], dict[str, Any]], dict[str, Any]]
# How it is decided about those contacts (their address hashes) from which rows differ; may ask the database.
Taken = Callable[[Connection, Collection[bytes]], Decision]
EMAIL, TIME_ZONE = "email", "time_zone"


def missing(_connection: Connection, _differing: Collection[bytes]) -> Decision:
    """A `Taken`: what a contact has stays, and rows only add what it does not have."""
    return _missing


def _missing(_address_hash: bytes, _updated_at: dt.datetime, stored: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if stored.get(key) is None}


class _Collision(Exception):
    """Another writer inserted one of these contacts between our look and our insert."""


def merge(
    engine: Engine,
    rows: pa.Table,
    *,
    list_id: int | None,
    now: dt.datetime,
    mostly_new: bool = False,
    source: str = "import",
    taken: Taken | None = None,
    also: Callable[[Connection], None] | None = None,
) -> Outcome:
    """Insert or update at most `bulk.CHUNK_ROWS` contacts (columns of `STAGED`, addresses distinct) and subscribe them to the list, if there is one.

    Subscriptions made say `source`. Where `taken` is given it says which of a known contact's values are taken over;
    otherwise all are. Fields not named in a row keep their values. A subscription that exists, ended or not, stays as it is. Only contacts that changed get a
    row in the change feed. With `mostly_new` the rows are inserted first and only those that were there already are looked at, which is faster if they
    are few and slower if they are many. `also` is called at the end of the same transaction, and again if that is tried again.
    """

    def work(connection: Connection) -> Outcome:
        outcome = merge_within(connection, rows, list_id=list_id, now=now, mostly_new=mostly_new, source=source, taken=taken)
        if also:
            also(connection)
        return outcome

    return transact_merge(engine, work)


def transact_merge(engine: Engine, work: Callable[[Connection], T]) -> T:
    """Run `work`, which merges, in one write transaction; again if another writer made one of the contacts meanwhile."""
    for attempt in itertools.count(1):
        try:
            return transact(engine, work)
        except (sa.exc.IntegrityError, _Collision):
            # The other writer's contact is visible now, so the next attempt updates it.
            if attempt == _COLLISIONS:
                raise
    raise AssertionError("unreachable")


def merge_within(
    connection: Connection,
    rows: pa.Table,
    *,
    list_id: int | None,
    now: dt.datetime,
    mostly_new: bool = False,
    source: str = "import",
    taken: Taken | None = None,
) -> Outcome:
    """As `merge`, within a transaction of `transact_merge`."""
    inserted = updated = unchanged = 0
    erased: frozenset[int] = frozenset()
    changed: list[sa.Select[Any]] = []
    if mostly_new:
        made, inserted, rows = _insert_loaded(connection, rows, now)
        changed.append(made)
    if rows.num_rows:
        stage(connection, STAGED, rows)
        erased = _drop_erased(connection)
        _find(connection, list_id)
        _update(connection, list_id, now, taken)
        new, updated, unchanged, known = _count(connection)
        if known:
            changed.append(sa.select(STAGED.c.contact_id).where(STAGED.c.contact_id > _NOTHING_NEW))
        if new:
            changed.append(_insert_staged(connection, new, now))
        inserted += new
    if changed:
        everyone = sa.select(sa.union_all(*changed).subquery())
        if list_id is not None:
            _subscribe(connection, everyone, list_id, now, source)
        changes.record(connection, everyone, "upsert", now=now)
    return Outcome(inserted, updated, unchanged, erased)


def _insert_loaded(connection: Connection, rows: pa.Table, now: dt.datetime) -> tuple[sa.Select[Any], int, pa.Table]:
    """Insert what is new of the rows; returns the query of the new ids, their number, and the rows left, whose contacts exist or were erased."""
    import pyarrow as pa
    import pyarrow.compute as pc

    before = _highest(connection)
    time = pa.repeat(pa.scalar(now, pa.timestamp("us", "UTC")), rows.num_rows)
    constants = {"tracking_allowed": pa.repeat(True, rows.num_rows), "created_at": time, "updated_at": time}
    loaded = bulk.load(connection, _CONTACTS, pa.table({name: rows[name] for name in _COPIED if name in rows.column_names} | constants), ignore_duplicates=True)
    made = _made_since(connection, before, loaded, now)
    erased = made.join(Suppression, Suppression.address_hash == Contact.address_hash).where(Suppression.reason == "erased")
    erased_ids = connection.execute(erased).scalars().all()
    for chosen in slices(erased_ids):
        connection.execute(sa.delete(Contact).where(Contact.id.in_(chosen)))
    inserted = loaded - len(erased_ids)
    if inserted == rows.num_rows:
        return made, inserted, rows.slice(0, 0)
    hashes = connection.execute(made.with_only_columns(Contact.address_hash)).scalars().all()
    return made, inserted, rows.filter(pc.invert(pc.is_in(rows["address_hash"], value_set=pa.array(hashes, pa.binary(16)))))


def _highest(connection: Connection) -> int:
    return connection.execute(sa.select(sa.func.coalesce(sa.func.max(Contact.id), 0))).scalar_one()


def _made_since(connection: Connection, before: int, expected: int, now: dt.datetime) -> sa.Select[Any]:
    """The query of the ids of contacts just made: above all that were there `before`, with this import's time; one walk along the primary key.

    Raises `_Collision` if they are not as many as expected, because another import of the same time has made some, too.
    """
    made = sa.select(Contact.id).where(Contact.id > before, Contact.id <= _highest(connection), Contact.created_at == now)
    if connection.execute(sa.select(sa.func.count()).select_from(made.subquery())).scalar_one() != expected:
        raise _Collision
    return made


def stage(connection: Connection, table: sa.Table, rows: pa.Table) -> None:
    """Make a temporary table anew and load rows into it."""
    # In these words, for MySQL commits when a table is dropped unless it is said to be temporary.
    connection.exec_driver_sql(f"DROP {'TEMPORARY TABLE IF EXISTS ' if is_mysql(connection) else 'TABLE IF EXISTS temp.'}{table.name}")
    table.create(connection, checkfirst=False)
    bulk.load(connection, table, rows, ignore_duplicates=True)


def _drop_erased(connection: Connection) -> frozenset[int]:
    query = sa.select(STAGED.c.line).join(Suppression, Suppression.address_hash == STAGED.c.address_hash).where(Suppression.reason == "erased")
    erased = frozenset(connection.execute(query).scalars())
    for chosen in slices(erased):
        connection.execute(sa.delete(STAGED).where(STAGED.c.line.in_(chosen)))
    return erased


def _find(connection: Connection, list_id: int | None) -> None:
    """Set `contact_id` of the rows whose contact exists."""
    found = (
        sa.select(sa.case((sa.and_(_same_letters(), _is_known_to(list_id)), _NOTHING_NEW), else_=Contact.id))
        .where(Contact.address_hash == STAGED.c.address_hash)
        .correlate(STAGED)
    )
    connection.execute(sa.update(STAGED).values(contact_id=found.scalar_subquery()))


def _is_known_to(list_id: int | None) -> sa.ColumnElement[bool]:
    """Whether the contact has a subscription to the list, ended or not; if there is no list, it has what it needs."""
    if list_id is None:
        return sa.true()
    return sa.exists().where(Subscription.contact_id == Contact.id, Subscription.list_id == list_id)


def _same_letters() -> sa.ColumnElement[bool]:
    """Whether a contact has the staged e-mail, attributes and time zone, case and order of the fields included."""
    pairs: list[tuple[Any, Any]] = [(Contact.email, STAGED.c.email), (Contact.attributes, STAGED.c.attributes)]
    same_zone = sa.or_(STAGED.c.time_zone.is_(None), sa.func.coalesce(Contact.time_zone, "") == STAGED.c.time_zone)
    return sa.and_(*(sa.cast(stored, sa.LargeBinary) == sa.cast(staged, sa.LargeBinary) for stored, staged in pairs), same_zone)


def _update(connection: Connection, list_id: int | None, now: dt.datetime, taken: Taken | None) -> None:
    """Write e-mail, time zone and merged attributes of the known contacts that differ, and mark the rows that prove to say nothing new."""
    import pyarrow as pa

    query = (
        sa.select(
            STAGED.c.line,
            STAGED.c.email,
            STAGED.c.attributes,
            STAGED.c.time_zone,
            Contact.id,
            Contact.address_hash,
            Contact.updated_at,
            Contact.email.label("stored_email"),
            Contact.time_zone.label("stored_zone"),
            sa.type_coerce(Contact.attributes, sa.Text).label("stored"),
            _is_known_to(list_id).label("known"),
        )
        .join(Contact, Contact.id == STAGED.c.contact_id)
        .where(STAGED.c.contact_id > _NOTHING_NEW, sa.not_(_same_letters()))
        .with_for_update()
    )
    changed: list[tuple[int, str, str | None, str]] = []
    alike: list[int] = []
    differing = connection.execute(query).all()
    decide = taken(connection, [row.address_hash for row in differing]) if taken and differing else None
    for row in differing:
        stored = json.loads(row.stored)
        before = stored | {EMAIL: row.stored_email, TIME_ZONE: row.stored_zone}
        given = json.loads(row.attributes) | {EMAIL: row.email} | ({TIME_ZONE: row.time_zone} if row.time_zone else {})
        after = before | (decide(row.address_hash, row.updated_at, before, given) if decide else given)
        if after != before:
            email, zone = after.pop(EMAIL), after.pop(TIME_ZONE)
            changed.append((row.id, email, zone, json.dumps(after, ensure_ascii=False)))
        elif row.known:
            alike.append(row.line)
    for chosen in slices(alike):
        connection.execute(sa.update(STAGED).where(STAGED.c.line.in_(chosen)).values(contact_id=_NOTHING_NEW))
    if changed:
        ids, *columns = zip(*changed, strict=True)
        texts = dict(zip(("email", "time_zone", "attributes"), columns, strict=True))
        rows = pa.table({"contact_id": pa.array(ids, pa.int64())} | {name: pa.array(values, pa.string()) for name, values in texts.items()})
        stage(connection, _UPDATES, rows)
        values = {"email": _UPDATES.c.email, "time_zone": _UPDATES.c.time_zone, "attributes": sa.type_coerce(_UPDATES.c.attributes, sa.JSON), "updated_at": now}
        connection.execute(sa.update(Contact).where(Contact.id == _UPDATES.c.contact_id).values(values))


def _count(connection: Connection) -> tuple[int, int, int, int]:
    """Contacts to be made; rows that change one, and that change nothing, repeated ones not counted; contacts to be changed in all."""
    contact_id, once = STAGED.c.contact_id, sa.not_(STAGED.c.repeated)
    counted = [contact_id.is_(None), sa.and_(contact_id > _NOTHING_NEW, once), sa.and_(contact_id == _NOTHING_NEW, once), contact_id > _NOTHING_NEW]
    row = connection.execute(sa.select(*(sa.func.count(sa.case((condition, 1))) for condition in counted)).select_from(STAGED)).one()
    return row[0], row[1], row[2], row[3]


def _insert_staged(connection: Connection, expected: int, now: dt.datetime) -> sa.Select[Any]:
    """Make the contacts that were not found; returns the query of their ids."""
    before = _highest(connection)
    time = Contact.created_at.type
    constants = {"tracking_allowed": sa.literal(True), "created_at": sa.literal(now, time), "updated_at": sa.literal(now, time)}
    chosen = sa.select(*(STAGED.c[name] for name in _COPIED), *constants.values()).where(STAGED.c.contact_id.is_(None))
    connection.execute(sa.insert(Contact).from_select([*_COPIED, *constants], chosen))
    return _made_since(connection, before, expected, now)


def _subscribe(connection: Connection, contacts: sa.Select[Any], list_id: int, now: dt.datetime, source: str) -> None:
    constants = {
        "list_id": sa.literal(list_id),
        "subscribed": sa.literal(True),
        "source": sa.literal(source),
        "changed_at": sa.literal(now, Subscription.changed_at.type),
    }
    chosen = sa.select(contacts.subquery().c[0], *constants.values())
    connection.execute(insert_if_absent(Subscription).from_select(["contact_id", *constants], chosen))
