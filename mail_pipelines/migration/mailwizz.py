"""MailWizz 1.3 to 2 (MySQL): what its tables mean. Times are in UTC; a subscriber and a field are one row for each list."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import sqlalchemy as sa

from mail_pipelines.contacts.fields import FieldType
from mail_pipelines.migration import cleaning
from mail_pipelines.migration.source import Ban, Bounce, DatabaseSource, Page, Person, SourceField, SourceList, State

# Types of custom fields that are not text here.
_TYPES: Mapping[str, FieldType] = {"date": "date", "datetime": "datetime", "rating": "number"}
# Not a field of its own: the address.
_ADDRESS_TAG = "EMAIL"
_STATES = {"confirmed": "active", "unconfirmed": "unconfirmed", "unapproved": "unconfirmed", "unsubscribed": "left", "blacklisted": "blocked"}
_BLACKLISTS = ("email_blacklist", "customer_email_blacklist")
# Addresses of lists that a campaign may choose not to mail.
_SUPPRESSED = "customer_suppression_list_email"
# What the reason of a blacklisted address says, the first that is found: it is written by programs and by people.
_REASONS = (
    ("complaint", re.compile(r"complain|abuse|spam report|feedback loop|\bfbl\b", re.IGNORECASE)),
    ("unsubscribe", re.compile(r"unsubscri|opt(ed)?[ -]?out", re.IGNORECASE)),
    ("bounce", re.compile(r"\b[45]\d\d\b|\b[45]\.\d+\.\d+\b|bounce|mailbox|user unknown|does not exist", re.IGNORECASE)),
)


class MailWizz(DatabaseSource):
    name: ClassVar[str] = "mailwizz"
    known_by: ClassVar[str] = "list_subscriber"

    @classmethod
    def is_ours(cls, prefix: str, names: Sequence[str]) -> bool:
        return f"{prefix}list_field_value" in names and f"{prefix}list" in names

    def lists(self) -> Sequence[SourceList]:
        lists = self.table("list", "list_id", "name")
        return [SourceList(row.list_id, cleaning.text(row.name)) for row in self.rows(sa.select(lists).order_by(lists.c.list_id))]

    def fields(self) -> Sequence[SourceField]:
        rows = [row for row in self._custom.values() if row.tag != _ADDRESS_TAG]
        return [SourceField(row.field_id, cleaning.text(row.tag), _TYPES.get(row.identifier, "text")) for row in rows]

    def sample(self, field: SourceField) -> Sequence[str]:
        values = self._values()
        rows = self.rows(sa.select(values.c.value).where(values.c.field_id == field.id, values.c.value != "").limit(1_000))
        return self.sampled(self._value(field.id, row.value) for row in rows)

    def pages(self, list_: SourceList, *, left: bool) -> Iterator[Page]:
        rows, state = self._subscribers()
        query = sa.select(rows.c.subscriber_id.label("id"), rows.c.email, rows.c.ip_address, rows.c.source, rows.c.date_added, rows.c.last_updated, state)
        query = query.add_columns(self._blocked(rows).label("blocked"))
        query = query.where(rows.c.list_id == list_.id, (state == "left") if left else (state != "left"))
        for page in self.keyset(query, rows.c.subscriber_id):
            ids = [row.id for row in page]
            opted_in = self._history("list_subscriber_optin_history", ("optin_ip", "optin_date", "confirm_ip", "confirm_date"), ids)
            opted_out = self._history("list_subscriber_optout_history", ("optout_ip", "optout_date"), ids)
            clicked = self._history("campaign_track_unsubscribe", ("ip_address", "date_added"), ids)
            people = {row.id: _person(row, opted_in.get(row.id), opted_out.get(row.id), clicked.get(row.id)) for row in page}
            values = self._values()
            found: defaultdict[tuple[int, Hashable], list[str]] = defaultdict(list)
            for value in self.values(sa.select(values).order_by(values.c.value_id), values.c.subscriber_id, ids):
                # A field with more than one choice has a row for each.
                if cleaned := self._value(value.field_id, value.value):
                    found[value.subscriber_id, value.field_id].append(cleaned)
            for (id_, field_id), texts in found.items():
                people[id_].values[field_id] = ", ".join(texts)
            yield Page(list(people.values()))

    def counts(self, list_: SourceList) -> Mapping[State, int]:
        rows, state = self._subscribers()
        counted = sa.select(state, sa.func.count().label("rows")).select_from(rows).where(rows.c.list_id == list_.id).group_by(sa.text("state"))
        return {row.state: row.rows for row in self.rows(counted)}

    def bans(self) -> Iterator[Sequence[Ban]]:
        # A customer's own blacklist counts everywhere, too: whose a list was is not known here.
        for name in _BLACKLISTS:
            if name in self.tables:
                banned = self.table(name, "email_id", "email", "reason", "date_added")
                query = sa.select(banned.c.email_id.label("id"), banned.c.email, banned.c.reason, banned.c.date_added)
                for page in self.keyset(query, banned.c.email_id):
                    yield [Ban(cleaning.text(row.email), reason_of(row.reason or ""), cleaning.time(row.date_added)) for row in page]
        # Which campaigns it was for, campaigns here cannot say: rather for all than for none.
        if _SUPPRESSED in self.tables:
            banned = self.table(_SUPPRESSED, "email_id", "email")
            for page in self.keyset(sa.select(banned.c.email_id.label("id"), banned.c.email), banned.c.email_id):
                yield [Ban(cleaning.text(row.email), "manual", None) for row in page]

    def bounces(self) -> Iterator[Sequence[Bounce]]:
        for page in self._logged("campaign_bounce_log", "bounce_type"):
            yield [
                Bounce(f"bounce {row.id}", row.email or "", "hard" if row.bounce_type == "hard" else "soft", cleaning.time(row.date_added), row.words or "")
                for row in page
            ]
        for page in self._logged("campaign_complain_log") if "campaign_complain_log" in self.tables else ():
            yield [Bounce(f"complaint {row.id}", row.email or "", "complaint", cleaning.time(row.date_added), row.words or "") for row in page]

    def _logged(self, name: str, *columns: str) -> Iterator[Sequence[sa.Row[Any]]]:
        rows = self.table("list_subscriber", "subscriber_id", "email")
        log = self.table(name, "log_id", "subscriber_id", "message", "date_added", *columns)
        words = sa.func.left(log.c.message, 2_000).label("words")
        query = sa.select(log.c.log_id.label("id"), words, log.c.date_added, *(log.c[column] for column in columns), rows.c.email)
        return self.keyset(query.outerjoin(rows, rows.c.subscriber_id == log.c.subscriber_id), log.c.log_id)

    def _subscribers(self) -> tuple[sa.TableClause, sa.ColumnElement[Any]]:
        rows = self.table("list_subscriber", "subscriber_id", "list_id", "email", "ip_address", "source", "status", "date_added", "last_updated")
        return rows, sa.case(_STATES, value=rows.c.status, else_="disabled").label("state")

    def _blocked(self, rows: sa.TableClause) -> sa.ColumnElement[Any]:
        """The reason of a blacklisted subscriber, where the blacklist itself gives none."""
        log = self.table("campaign_bounce_log", "subscriber_id", "bounce_type")
        hard = sa.exists().where(log.c.subscriber_id == rows.c.subscriber_id, log.c.bounce_type == "hard").correlate(rows)
        conditions: list[tuple[sa.ColumnElement[bool], Any]] = [(rows.c.status != "blacklisted", sa.null())]
        for name in _BLACKLISTS:
            if name in self.tables:
                banned = self.table(name, "email")
                conditions.append((sa.exists().where(banned.c.email == rows.c.email).correlate(rows), sa.null()))
        return sa.case(*conditions, (hard, "bounce"), else_="manual")

    def _history(self, name: str, columns: Sequence[str], ids: Sequence[int]) -> dict[int, sa.Row[Any]]:
        if name not in self.tables:
            return {}
        table = self.table(name, "subscriber_id", *columns)
        return {row.subscriber_id: row for row in self.values(sa.select(table), table.c.subscriber_id, ids)}

    @functools.cached_property
    def _custom(self) -> Mapping[Hashable, sa.Row[Any]]:
        fields = self.table("list_field", "field_id", "type_id", "tag")
        types = self.table("list_field_type", "type_id", "identifier")
        query = sa.select(fields.c.field_id, fields.c.tag, types.c.identifier).join(types, types.c.type_id == fields.c.type_id)
        return {row.field_id: row for row in self.rows(query.order_by(fields.c.field_id))}

    def _values(self) -> sa.TableClause:
        return self.table("list_field_value", "value_id", "subscriber_id", "field_id", "value")

    def _value(self, field_id: Hashable, value: str | None) -> str:
        is_date = field_id in self._custom and self._custom[field_id].identifier == "date"
        return cleaning.day(value or "") if is_date else cleaning.text(value)


def reason_of(text: str) -> str:
    """The reason of a suppression that the words of a blacklist mean; `manual` if they say none."""
    return next((reason for reason, pattern in _REASONS if pattern.search(text)), "manual")


def _person(row: sa.Row[Any], opted_in: sa.Row[Any] | None, opted_out: sa.Row[Any] | None, clicked: sa.Row[Any] | None) -> Person:
    confirmed_at = cleaning.time(opted_in.confirm_date) if opted_in else None
    left_at = (cleaning.time(opted_out.optout_date) if opted_out else None) or (cleaning.time(clicked.date_added) if clicked else None)
    is_active = row.state in ("active", "unconfirmed")
    since = left_at or cleaning.time(row.last_updated) if row.state == "left" else confirmed_at if is_active else cleaning.time(row.last_updated)
    known = cleaning.evidence(
        requested_at=(cleaning.time(opted_in.optin_date) if opted_in else None) or cleaning.time(row.date_added),
        requested_ip=(opted_in.optin_ip if opted_in else None) or row.ip_address,
        confirmed_at=confirmed_at,
        confirmed_ip=opted_in.confirm_ip if opted_in else None,
        form=row.source,
        left_at=left_at,
        left_ip=(opted_out.optout_ip if opted_out else None) or (clicked.ip_address if clicked else None),
    )
    return Person(row.id, row.email or "", row.state, since or cleaning.time(row.date_added), row.blocked, known)
