"""Interspire Email Marketer 5 and 6 (MySQL): what its tables mean. Times are seconds since 1970; a subscriber is one row for each list."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import sqlalchemy as sa

from mail_pipelines.contacts.fields import FieldType
from mail_pipelines.migration import cleaning
from mail_pipelines.migration.source import Ban, Bounce, DatabaseSource, Page, Person, SourceField, SourceList, State

# Types of custom fields that are not text here.
_TYPES: Mapping[str, FieldType] = {"number": "number", "date": "date"}


class Interspire(DatabaseSource):
    name: ClassVar[str] = "interspire"
    known_by: ClassVar[str] = "list_subscribers"

    @classmethod
    def is_ours(cls, prefix: str, names: Sequence[str]) -> bool:
        return f"{prefix}subscribers_data" in names and f"{prefix}lists" in names

    def lists(self) -> Sequence[SourceList]:
        lists = self.table("lists", "listid", "name")
        return [SourceList(row.listid, cleaning.text(row.name)) for row in self.rows(sa.select(lists).order_by(lists.c.listid))]

    def fields(self) -> Sequence[SourceField]:
        return [SourceField(row.fieldid, cleaning.text(row.name), _TYPES.get(row.fieldtype, "text")) for row in self._custom.values()]

    def sample(self, field: SourceField) -> Sequence[str]:
        data = self._data()
        rows = self.rows(sa.select(data.c.data).where(data.c.fieldid == field.id, data.c.data != "").limit(1_000))
        return self.sampled(self._value(field.id, row.data) for row in rows)

    def pages(self, list_: SourceList, *, left: bool) -> Iterator[Page]:
        rows, since_left, state = self._subscribers(list_)
        columns = ("emailaddress", "requestdate", "requestip", "confirmdate", "confirmip", "subscribedate", "bounced", "formid")
        unsubscribed = self._unsubscribed()
        said = sa.func.coalesce(sa.func.nullif(unsubscribed.c.unsubscribeip, ""), unsubscribed.c.unsubscriberequestip)
        ip = self._of(rows, sa.select(sa.func.max(said)), unsubscribed)
        query = sa.select(rows.c.subscriberid.label("id"), *(rows.c[name] for name in columns), since_left.label("left_at"), ip.label("left_ip"), state)
        query = query.where(rows.c.listid == list_.id, (state == "left") if left else (state != "left"))
        for page in self.keyset(query, rows.c.subscriberid):
            people = {row.id: self._person(row) for row in page}
            data = self._data()
            for value in self.values(sa.select(data), data.c.subscriberid, list(people)):
                people[value.subscriberid].values[value.fieldid] = self._value(value.fieldid, value.data)
            yield Page(list(people.values()))

    def counts(self, list_: SourceList) -> Mapping[State, int]:
        rows, _, state = self._subscribers(list_)
        counted = sa.select(state, sa.func.count().label("rows")).select_from(rows).where(rows.c.listid == list_.id).group_by(sa.text("state"))
        return {row.state: row.rows for row in self.rows(counted)}

    def bans(self) -> Iterator[Sequence[Ban]]:
        # Their list is a number, or `g` for all of them.
        banned = self.table("banned_emails", "banid", "emailaddress", "list", "bandate")
        for page in self.keyset(sa.select(banned.c.banid.label("id"), banned.c.emailaddress, banned.c.list, banned.c.bandate), banned.c.banid):
            yield [
                Ban(
                    cleaning.text(row.emailaddress),
                    "manual",
                    cleaning.unix_time(row.bandate),
                    int(row.list) if str(row.list).isdigit() else None,
                )
                for row in page
            ]

    def bounces(self) -> Iterator[Sequence[Bounce]]:
        bounces = self.table("list_subscriber_bounces", "bounceid", "subscriberid", "bouncetime", "bouncetype", "bouncerule", "bouncemessage")
        rows = self.table("list_subscribers", "subscriberid", "emailaddress")
        query = sa.select(
            bounces.c.bounceid.label("id"),
            bounces.c.bouncetime,
            bounces.c.bouncetype,
            bounces.c.bouncerule,
            sa.func.left(bounces.c.bouncemessage, 2_000).label("message"),
            rows.c.emailaddress,
        ).outerjoin(rows, rows.c.subscriberid == bounces.c.subscriberid)
        for page in self.keyset(query, bounces.c.bounceid):
            yield [
                Bounce(
                    str(row.id),
                    row.emailaddress or "",
                    "hard" if row.bouncetype == "hard" else "soft",
                    cleaning.unix_time(row.bouncetime),
                    " ".join(filter(None, (cleaning.text(row.bouncerule), cleaning.text(row.message)))),
                )
                for row in page
            ]

    def _subscribers(self, list_: SourceList) -> tuple[sa.TableClause, sa.ColumnElement[Any], sa.ColumnElement[Any]]:
        """The subscribers, when one left, and the state. Whoever asked to leave has left, confirmed or not, unless the subscription is younger."""
        rows = self.table(
            "list_subscribers",
            *("subscriberid", "listid", "emailaddress", "confirmed", "requestdate", "requestip", "confirmdate", "confirmip", "subscribedate"),
            *("bounced", "unsubscribed", "unsubscribeconfirmed", "formid"),
        )
        unsubscribed = self._unsubscribed()
        # A request that nobody has confirmed yet has only the time of the request.
        time = sa.func.greatest(unsubscribed.c.unsubscribetime, sa.func.coalesce(unsubscribed.c.unsubscriberequesttime, 0))
        asked = sa.func.coalesce(self._of(rows, sa.select(sa.func.max(time)), unsubscribed), 0)
        is_left = sa.or_(
            rows.c.unsubscribed > 0,
            rows.c.unsubscribeconfirmed == "1",
            sa.and_(asked > 0, asked >= sa.func.coalesce(rows.c.subscribedate, 0)),
        )
        state = sa.case((is_left, "left"), (rows.c.bounced > 0, "bounced"), (rows.c.confirmed == "1", "active"), else_="unconfirmed")
        return rows, sa.func.greatest(asked, sa.func.coalesce(rows.c.unsubscribed, 0)), state.label("state")

    def _of(self, rows: sa.TableClause, query: sa.Select[Any], table: sa.TableClause) -> sa.ScalarSelect[Any]:
        return query.where(table.c.subscriberid == rows.c.subscriberid, table.c.listid == rows.c.listid).correlate(rows).scalar_subquery()

    def _unsubscribed(self) -> sa.TableClause:
        times, addresses = ("unsubscribetime", "unsubscriberequesttime"), ("unsubscribeip", "unsubscriberequestip")
        return self.table("list_subscribers_unsubscribe", "subscriberid", "listid", *times, *addresses)

    @functools.cached_property
    def _custom(self) -> Mapping[Hashable, sa.Row[Any]]:
        custom = self.table("customfields", "fieldid", "name", "fieldtype")
        return {row.fieldid: row for row in self.rows(sa.select(custom).order_by(custom.c.fieldid))}

    def _data(self) -> sa.TableClause:
        return self.table("subscribers_data", "subscriberid", "fieldid", "data")

    def _person(self, row: sa.Row[Any]) -> Person:
        since = row.left_at if row.state == "left" else row.bounced if row.state == "bounced" else row.confirmdate or row.subscribedate
        known = cleaning.evidence(
            requested_at=cleaning.unix_time(row.requestdate),
            requested_ip=row.requestip,
            confirmed_at=cleaning.unix_time(row.confirmdate),
            confirmed_ip=row.confirmip,
            form=row.formid or "",
            left_at=cleaning.unix_time(row.left_at),
            left_ip=row.left_ip,
        )
        return Person(row.id, row.emailaddress or "", row.state, cleaning.unix_time(since), "bounce" if row.bounced else None, known)

    def _value(self, field_id: Hashable, data: str | None) -> str:
        is_date = field_id in self._custom and self._custom[field_id].fieldtype == "date"
        return cleaning.day(data or "") if is_date else cleaning.choices(data or "")
