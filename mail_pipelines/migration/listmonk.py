"""listmonk 2.5 to 6 (PostgreSQL): what its tables mean. A subscriber is one row, with a row for each list; custom fields are the keys of a JSON object."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import sqlalchemy as sa

from mail_pipelines.contacts.fields import FieldType, fits
from mail_pipelines.migration import cleaning
from mail_pipelines.migration.source import SAMPLE, Bounce, DatabaseSource, Page, Person, SourceField, SourceList, State

_TYPES: Mapping[str, FieldType] = {"number": "number", "boolean": "boolean"}
# Their column beside the address, as a field here; the others are keys of `attribs`, which are kept apart from it by a pair.
_NAME = "name"
# The subscribers who are in none of their lists, as one.
WITHOUT = SourceList(0, "listmonk without list")
_SUBSCRIBERS = sa.table("subscribers", *map(sa.column, ("id", "email", "name", "attribs", "status", "created_at", "updated_at")))
_SUBSCRIBED = sa.table("subscriber_lists", *map(sa.column, ("subscriber_id", "list_id", "status", "meta", "created_at", "updated_at")))
_IS_OBJECT = sa.func.jsonb_typeof(_SUBSCRIBERS.c.attribs) == "object"


class Listmonk(DatabaseSource):
    name: ClassVar[str] = "listmonk"
    known_by: ClassVar[str] = "subscriber_lists"

    @classmethod
    def is_ours(cls, prefix: str, names: Sequence[str]) -> bool:
        return prefix == "" and "subscribers" in names and "bounces" in names

    def lists(self) -> Sequence[SourceList]:
        lists = self.table("lists", "id", "name")
        found = [SourceList(row.id, row.name) for row in self.rows(sa.select(lists.c.id, lists.c.name).order_by(lists.c.id))]
        return [*found, WITHOUT] if any(self.counts(WITHOUT).values()) else found

    def fields(self) -> Sequence[SourceField]:
        # What is no object has no pairs, and asking for them is an error, whatever the WHERE clause says.
        pairs = sa.func.jsonb_each(sa.case((_IS_OBJECT, _SUBSCRIBERS.c.attribs))).table_valued("key", "value").lateral("pairs")
        kind = sa.func.jsonb_typeof(pairs.c.value).label("kind")
        query = sa.select(pairs.c.key, kind).select_from(_SUBSCRIBERS.join(pairs, sa.true())).distinct()
        kinds: defaultdict[str, set[str]] = defaultdict(set)
        for row in self.rows(query):
            if row.kind != "null":
                kinds[row.key].add(row.kind)
        found = [SourceField(_NAME, "Name", "text")]
        for key, types in sorted(kinds.items()):
            field = SourceField(("attribs", key), key, _TYPES.get(types.pop(), "text") if len(types) == 1 else "text")
            found.append(self._dated(field) if field.type == "text" else field)
        return found

    def _dated(self, field: SourceField) -> SourceField:
        """JSON has no days and times: texts that all look like one are."""
        texts = self.sample(field)
        type_: FieldType | None = next((type_ for type_ in ("date", "datetime") if texts and fits(texts, type_)), None)
        return SourceField(field.id, field.label, type_ or "text")

    def sample(self, field: SourceField) -> Sequence[str]:
        if field.id == _NAME:
            return self.sampled(row.name for row in self.rows(sa.select(_SUBSCRIBERS.c.name).limit(SAMPLE)))
        value = sa.func.jsonb_extract_path(_SUBSCRIBERS.c.attribs, field.label)
        rows = self.rows(sa.select(value.label("value")).where(_IS_OBJECT, value.is_not(None)).limit(SAMPLE))
        return self.sampled(cleaning.json_text(row.value) for row in rows)

    def pages(self, list_: SourceList, *, left: bool) -> Iterator[Page]:
        joined, state = self._subscribers(list_)
        bounces = self.table("bounces", "subscriber_id", "type")

        def had(kind: str) -> sa.ColumnElement[bool]:
            return sa.exists().where(bounces.c.subscriber_id == _SUBSCRIBERS.c.id, _text(bounces.c.type) == kind).correlate(_SUBSCRIBERS)

        # Whoever is blocked without having bounced may have asked for it on the page for leaving.
        blocked = sa.case(
            (_text(_SUBSCRIBERS.c.status) != "blocklisted", sa.null()), (had("complaint"), "complaint"), (had("hard"), "bounce"), else_="unsubscribe"
        )
        table = _SUBSCRIBERS if list_ == WITHOUT else _SUBSCRIBED
        of_list: list[Any] = [table.c.created_at, table.c.updated_at, sa.null().label("meta") if list_ == WITHOUT else _SUBSCRIBED.c.meta]
        query = sa.select(_SUBSCRIBERS.c.id, _SUBSCRIBERS.c.email, _SUBSCRIBERS.c.name, _SUBSCRIBERS.c.attribs, state, blocked.label("blocked"))
        query = query.add_columns(*of_list)
        query = query.select_from(joined).where(*self._in(list_), (state == "left") if left else (state != "left"))
        for page in self.keyset(query, _SUBSCRIBERS.c.id):
            yield Page([_person(row) for row in page])

    def counts(self, list_: SourceList) -> Mapping[State, int]:
        joined, state = self._subscribers(list_)
        counted = sa.select(state, sa.func.count().label("rows")).select_from(joined).where(*self._in(list_)).group_by(sa.text("state"))
        return {row.state: row.rows for row in self.rows(counted)}

    def bounces(self) -> Iterator[Sequence[Bounce]]:
        bounces = self.table("bounces", "id", "subscriber_id", "type", "source", "meta", "created_at")
        query = sa.select(bounces.c.id, _text(bounces.c.type).label("kind"), bounces.c.source, bounces.c.meta, bounces.c.created_at, _SUBSCRIBERS.c.email)
        for page in self.keyset(query.outerjoin(_SUBSCRIBERS, _SUBSCRIBERS.c.id == bounces.c.subscriber_id), bounces.c.id):
            yield [Bounce(str(row.id), row.email or "", row.kind, cleaning.time(row.created_at), _words(row)) for row in page]

    def _subscribers(self, list_: SourceList) -> tuple[sa.FromClause, sa.ColumnElement[Any]]:
        """The rows of a list, and the state: unconfirmed subscribers of a list with single opt-in are mailed there."""
        lists = self.table("lists", "id", "optin")
        status = _text(_SUBSCRIBERS.c.status)
        if list_ == WITHOUT:
            return _SUBSCRIBERS, sa.case((status == "blocklisted", "blocked"), else_="disabled").label("state")
        state = sa.case(
            (_text(_SUBSCRIBED.c.status) == "unsubscribed", "left"),
            (status == "blocklisted", "blocked"),
            (status != "enabled", "disabled"),
            (sa.and_(_text(_SUBSCRIBED.c.status) == "unconfirmed", _text(lists.c.optin) == "double"), "unconfirmed"),
            else_="active",
        )
        joined = _SUBSCRIBERS.join(_SUBSCRIBED, _SUBSCRIBED.c.subscriber_id == _SUBSCRIBERS.c.id).join(lists, lists.c.id == _SUBSCRIBED.c.list_id)
        return joined, state.label("state")

    def _in(self, list_: SourceList) -> list[sa.ColumnElement[bool]]:
        if list_ == WITHOUT:
            return [~sa.exists().where(_SUBSCRIBED.c.subscriber_id == _SUBSCRIBERS.c.id).correlate(_SUBSCRIBERS)]
        return [_SUBSCRIBED.c.list_id == list_.id]


def _words(bounce: sa.Row[Any]) -> str:
    return " ".join(filter(None, (bounce.source, cleaning.json_text(bounce.meta))))


def _person(row: sa.Row[Any]) -> Person:
    attributes = row.attribs if isinstance(row.attribs, dict) else {}
    meta = row.meta if isinstance(row.meta, dict) else {}
    created_at, updated_at = cleaning.time(row.created_at), cleaning.time(row.updated_at)
    is_active = row.state in ("active", "unconfirmed")
    known = cleaning.evidence(requested_at=created_at, confirmed_ip=meta.get("optin_ip"), left_at=updated_at if row.state == "left" else None)
    values: dict[Hashable, str] = {_NAME: cleaning.mended(row.name).strip()} | {
        ("attribs", key): cleaning.json_text(value) for key, value in attributes.items()
    }
    return Person(row.id, row.email, row.state, created_at if is_active else updated_at, row.blocked, known, values)


def _text(column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """An enumeration as text, since it compares to nothing else."""
    return sa.cast(column, sa.Text)
