"""The freeze's second look at every member of a segment: does the database still allow this mail?

Snapshots say who matches; only the database says who may be mailed. Members are joined in chunks with contacts, suppressions and
subscriptions, and those who may not are counted by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.campaigns.overlap import overlapped
from mail_pipelines.contacts.consent import Scope, campaign_scopes, suppressed_clause
from mail_pipelines.database import bulk
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Contact, Subscription, Suppression

if TYPE_CHECKING:
    import pyarrow as pa

# Beside the reasons of suppressions: the contact is gone, or its address came up a second time while the freeze looked.
MISSING = "missing"
DUPLICATE = "duplicate"
UNSUBSCRIBED = "unsubscribe"
_CHUNK_ROWS = 50_000
# A temporary table, each connection's own: nothing of the central database is written.
_CHUNK = sa.Table("freeze_chunk", sa.MetaData(), sa.Column("contact_id", sa.BigInteger, primary_key=True, autoincrement=False), prefixes=["TEMPORARY"])


@dataclass(frozen=True)
class Allowed:
    """`members` may be mailed: contact_id, engagement_rank, address_hash and provider as the database has them. `excluded` counts the rest by reason.

    Of a campaign with a send window they have a time_zone, too (null: none).
    """

    members: pa.Table
    excluded: dict[str, int]


def allowed(engine: Engine, campaign: Campaign, members: pa.Table, advance: Callable[[int], None]) -> Allowed:
    """Look at all members (contact_id int64, unique and ascending; engagement_rank int32); `advance` is told how many were looked at since the last call."""
    import pyarrow as pa

    query = _query(campaign)
    kept: list[pa.Table] = []
    excluded: Counter[str] = Counter()
    chunks = (members.slice(start, _CHUNK_ROWS) for start in range(0, members.num_rows, _CHUNK_ROWS))
    for looked_at, part, reasons in overlapped(engine, lambda chunk: _look(engine, query, chunk), chunks):
        kept.append(part)
        excluded.update(reasons)
        advance(looked_at)
    columns = [("contact_id", pa.int64()), ("engagement_rank", pa.int32()), ("address_hash", pa.binary(16)), ("provider", pa.string())]
    if campaign.definition.window is not None:
        columns.append(("time_zone", pa.string()))
    table = pa.concat_tables([pa.schema(columns).empty_table(), *kept])
    unique = _first_of_each_address(table)
    if unique.num_rows < table.num_rows:
        excluded[DUPLICATE] += table.num_rows - unique.num_rows
    return Allowed(unique, dict(sorted(excluded.items())))


def _query(campaign: Campaign) -> sa.Select[Any]:
    """Of those who may not be mailed the reason, then address_hash, provider and, if it matters, time_zone: one row for each row of `_CHUNK`, in the order
    of contact_id."""
    scopes = campaign_scopes(campaign.brand_id, campaign.list_id)
    cases = [
        (Contact.id.is_(None), sa.literal(MISSING)),
        (suppressed_clause(Contact.address_hash, Contact.domain, scopes), _suppression_reason(scopes)),
    ]
    source = sa.outerjoin(_CHUNK, Contact, Contact.id == _CHUNK.c.contact_id)
    if campaign.list_id is not None:
        source = source.outerjoin(Subscription, sa.and_(Subscription.contact_id == Contact.id, Subscription.list_id == campaign.list_id))
        cases.append((Subscription.subscribed.is_(False), sa.literal(UNSUBSCRIBED)))
    reason = sa.case(*cases).label("reason")
    zone = () if campaign.definition.window is None else (Contact.time_zone,)
    return sa.select(reason, Contact.address_hash, Contact.provider, *zone).select_from(source).order_by(_CHUNK.c.contact_id)


def _suppression_reason(scopes: list[Scope]) -> sa.ColumnElement[str]:
    in_scope = sa.or_(*(sa.and_(Suppression.scope_kind == scope.kind, Suppression.scope_id == scope.id) for scope in scopes))
    by_address = sa.select(sa.func.min(Suppression.reason)).where(Suppression.address_hash == Contact.address_hash, in_scope)
    by_domain = sa.select(sa.func.min(Suppression.reason)).where(Suppression.domain == Contact.domain, in_scope)
    return sa.func.coalesce(by_address.correlate(Contact).scalar_subquery(), by_domain.correlate(Contact).scalar_subquery())


def _look(engine: Engine, query: sa.Select[Any], chunk: pa.Table) -> tuple[int, pa.Table, Counter[str]]:
    """How many were looked at, those allowed, and the others by reason."""
    import pyarrow as pa

    with reading(engine) as connection:
        _CHUNK.create(connection)
        try:
            bulk.load(connection, _CHUNK, chunk.select(["contact_id"]), ignore_duplicates=True)
            # Both sides are in the order of contact_id, so that the ids need not travel back.
            reasons, hashes, providers, *zones = zip(*connection.execute(query).all(), strict=True)
        finally:
            _CHUNK.drop(connection)
    found = chunk.select(["contact_id", "engagement_rank"])
    found = found.append_column("address_hash", pa.array(hashes, pa.binary(16))).append_column("provider", pa.array(providers, pa.string()))
    for names in zones:
        found = found.append_column("time_zone", pa.array(names, pa.string()))
    allowed = found.filter(pa.array([reason is None for reason in reasons]))
    return chunk.num_rows, allowed, Counter(reason for reason in reasons if reason is not None)


def _first_of_each_address(table: pa.Table) -> pa.Table:
    """Addresses are unique at any moment, but one may pass from one contact to another while chunks are read one after the other."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pc.count_distinct(table["address_hash"]).as_py() == table.num_rows:
        return table
    numbered = table.append_column("number", pa.array(range(table.num_rows), pa.int64()))
    first = numbered.group_by("address_hash").aggregate([("number", "min")])["number_min"]
    return table.take(first.sort())
