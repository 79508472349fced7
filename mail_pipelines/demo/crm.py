"""What the demo's CRM knows, what happens to it, and what it says and is told. Knows nothing of this platform; only the standard library is loaded.

What belongs here: the CRM's people, their changes and its own counting. What does not: HTTP (`crm_server`), who reads and tells it (`source`).
"""

from __future__ import annotations

import datetime as dt
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mail_pipelines.demo.people import COLUMNS, PLACES, SEED

# What the CRM's people are subscribed to; what they refuse elsewhere is not its business.
LIST = "crm"
MOST_A_PAGE = 500
# What happens by itself, and how often of a hundred times.
CHANGES = {"changed": 60, "new": 20, "unsubscribed": 12, "deleted": 8}
# How many of those who come want its mail.
_WANT_MAIL = 0.92


@dataclass
class Contact:
    """One of the CRM's people. `version` is the number of the last change of anything there: pages are in its order."""

    id: int
    version: int
    updated_at: dt.datetime
    person: dict[str, Any]
    newsletter: bool
    newsletter_at: dt.datetime | None
    deleted: bool = False
    left_at: dt.datetime | None = None
    left_because: str | None = None

    def row(self) -> dict[str, Any]:
        given = {name: self.person[name] for name in ("email", "first_name", "last_name", "country", "city", "orders", "vip")}
        return {
            "id": self.id,
            **given,
            "newsletter": self.newsletter,
            "newsletter_at": _text(self.newsletter_at),
            "deleted": self.deleted,
            "updated_at": _text(self.updated_at),
        }

    def refusal(self) -> dict[str, Any]:
        return {"id": self.id, "email": self.person["email"], "reason": self.left_because, "updated_at": _text(self.left_at)}


class Crm:
    """`people` are there from the start, `strangers` come one after the other. The same ones change in the same order in each CRM that begins with the same.

    Every method may be called by several threads.
    """

    def __init__(self, people: Iterable[Sequence[Any]], strangers: Iterator[Sequence[Any]], *, seed: int = SEED) -> None:
        self._lock = threading.Lock()
        self._draw = random.Random(seed)
        self._strangers = strangers
        self._contacts: list[Contact] = []
        self._version = 0
        self._changes: Counter[str] = Counter()
        self._events: dict[str, str] = {}
        self._answers: dict[str, dict[str, Any]] = {}
        self._repeated = 0
        self.changing = True
        now = _now()
        for person in people:
            self._join(person, now - dt.timedelta(days=self._draw.randrange(1, 365)))

    # --- what it says ----------------------------------------------------------------------------------------------

    def contacts(self, query: Mapping[str, str]) -> dict[str, Any]:
        """A page of those changed since `updated_after`, deleted ones included. Raises `ValueError` for a query that cannot be understood."""
        return self._page(query, lambda contact: contact.updated_at, Contact.row)

    def unsubscribed(self, query: Mapping[str, str]) -> dict[str, Any]:
        return self._page(query, lambda contact: contact.left_at, Contact.refusal)

    def _page(self, query: Mapping[str, str], time_of: Callable[[Contact], dt.datetime | None], row: Callable[[Contact], dict[str, Any]]) -> dict[str, Any]:
        limit, after = min(int(query.get("limit", MOST_A_PAGE)), MOST_A_PAGE), int(query.get("after", 0))
        since = dt.datetime.fromisoformat(query["updated_after"]) if "updated_after" in query else dt.datetime.min.replace(tzinfo=dt.UTC)
        with self._lock:
            # Whoever changes between two pages goes to the end, and is read again there.
            chosen = [contact for contact in self._contacts if contact.version > after and (at := time_of(contact)) is not None and at >= since]
            chosen.sort(key=lambda contact: contact.version)
            page = chosen[:limit]
            return {"results": [row(contact) for contact in page], "paging": {"next": page[-1].version if len(chosen) > limit else None}}

    def counts(self) -> dict[str, Any]:
        """Whom it knows (not who was deleted), what it was told by type, each event once, and how often what changed by itself."""
        with self._lock:
            people = [contact for contact in self._contacts if not contact.deleted]
            subscribed = sum(contact.newsletter for contact in people)
            return {
                "people": len(people),
                "subscribed": subscribed,
                "unsubscribed": len(people) - subscribed,
                "events": dict(sorted(Counter(self._events.values()).items())),
                "repeated": self._repeated,
                "changes": {kind: self._changes[kind] for kind in CHANGES},
            }

    # --- what it is told -------------------------------------------------------------------------------------------

    def take(self, events: Sequence[Mapping[str, Any]], request_key: str | None) -> dict[str, Any]:
        """Count events, each id once, and let go whoever wants no more mail; a request whose key is known is answered as it was.

        Raises `KeyError` or `ValueError` if an event has no id, type or contact: then none of them is counted.
        """
        given = {str(event["id"]): (str(event["type"]), int(event["contact"]), event.get("list"), event.get("reason")) for event in events}
        with self._lock:
            if request_key is not None and request_key in self._answers:
                self._repeated += len(events)
                return self._answers[request_key]
            new = {event_id: event for event_id, event in given.items() if event_id not in self._events}
            self._repeated += len(events) - len(new)
            for event_id, (kind, contact_id, list_key, reason) in new.items():
                self._events[event_id] = kind
                if kind in ("unsubscribe", "suppression") and list_key in (None, LIST) and 1 <= contact_id <= len(self._contacts):
                    self._leave(self._contacts[contact_id - 1], reason or "unsubscribe")
            answer = {"taken": len(new), "known": len(events) - len(new)}
            if request_key is not None:
                self._answers[request_key] = answer
            return answer

    def _leave(self, contact: Contact, reason: str) -> bool:
        if not contact.newsletter:
            return False
        contact.newsletter, contact.left_because = False, reason
        self._touch(contact)
        contact.left_at = contact.updated_at
        return True

    # --- what happens there by itself --------------------------------------------------------------------------------

    def let_change(self, changing: bool) -> None:
        """Whether anything changes by itself from now on."""
        with self._lock:
            self.changing = changing

    def change(self) -> None:
        """One thing happens, if anything is to change. What is drawn does not depend on what the CRM was told."""
        with self._lock:
            if not self.changing:
                return
            (kind,) = self._draw.choices(list(CHANGES), list(CHANGES.values()))
            contact = self._contacts[self._draw.randrange(len(self._contacts))] if self._contacts else None
            if self._happens(kind, contact):
                self._changes[kind] += 1

    def _happens(self, kind: str, contact: Contact | None) -> bool:
        if kind == "new":
            if (person := next(self._strangers, None)) is not None:
                self._join(person, _now())
            return person is not None
        if contact is None or contact.deleted:
            return False
        if kind == "unsubscribed":
            return self._leave(contact, "unsubscribe")
        if kind == "deleted":
            contact.deleted = True
        else:
            contact.person["city"] = self._draw.choice(PLACES[contact.person["country"]])
            contact.person["orders"] += 1
        self._touch(contact)
        return True

    def _join(self, person: Sequence[Any], at: dt.datetime) -> None:
        wants = self._draw.random() < _WANT_MAIL
        self._version += 1
        values = dict(zip(COLUMNS, person, strict=True))
        self._contacts.append(Contact(len(self._contacts) + 1, self._version, at, values, wants, at if wants else None))

    def _touch(self, contact: Contact) -> None:
        self._version += 1
        contact.version, contact.updated_at = self._version, _now()


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _text(moment: dt.datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
