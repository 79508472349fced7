"""Telling a REST API: events as JSON, in batches, each with its key; or one by one, each at an address of its own.

Values are values of the document, or quoted parts of the path; never of a host, a parameter or a header.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args
from urllib.parse import quote

import pydantic

from mail_pipelines.delivery.events import mask_addresses
from mail_pipelines.sources.declaration import Form, Told
from mail_pipelines.sources.errors import LoginError, SourceError
from mail_pipelines.sources.kinds import TAKEN, Event, EventField, Refused, Unavailable, Verdict, Writer
from mail_pipelines.sources.kinds.logins import Connection, open_session

# As `http.PatientSession` asks again after.
_LATER = frozenset({408, 425, 429, 500, 502, 503, 504})
# These say that the request is wrong, not what is in it.
_MISDIRECTED = frozenset({404, 405, 410, 415})
# Where the address is one event's own, these say that there is no such record.
_MISSING = frozenset({404, 410})
_MOST_WORDS = 300
_PLACE = re.compile(r"\{([a-z_]+)\}")


class Results(Form):
    """Where an answer says what became of each event: a list at `path`, whose entries have the event's key and a status as of HTTP."""

    path: str
    key: str = "key"
    status: str = "status"


class Send(Form):
    """`body` maps names of the service to fields of an event, `constants` has what is always the same; a dot leads into a nested value.

    The events are a list, under the name `items` if there is one; with `batch: 1` and no `items` an event is the whole document, and `path` may have fields of
    it in braces (`contacts/{external_id}`). `key_header` is a header that takes the key of the request: the event's if there is one event, else a digest of
    theirs. `idempotent` says that the request sets a state, so that it may come again without a key. `errors` is where a taken request still says what is
    wrong with it. `says` leaves nothing else to be told by this request.
    """

    path: str
    method: Literal["POST", "PUT", "PATCH"] = "POST"
    batch: int = pydantic.Field(default=100, ge=1, le=10_000)
    items: str | None = None
    body: dict[str, EventField] = pydantic.Field(default={})
    constants: dict[str, str | int | float | bool] = pydantic.Field(default={})
    key_header: str | None = pydantic.Field(default=None, pattern=r"^[A-Za-z0-9-]{1,64}$")
    idempotent: bool = False
    results: Results | None = None
    errors: str | None = None
    says: list[Told] | None = None

    @property
    def places(self) -> list[str]:
        """Fields of an event that stand in the path."""
        return _PLACE.findall(self.path)

    @pydantic.model_validator(mode="after")
    def _says_whose_and_which(self) -> Send:
        alone = self.batch == 1 and not self.items
        if self.places and not alone:
            raise ValueError("path: it has a field of an event, so each is sent alone: batch: 1, without items")
        if unknown := sorted(set(self.places) - set(get_args(EventField))):
            raise ValueError(f"path: {{{unknown[0]}}} is no field of an event; expected one of {', '.join(get_args(EventField))}")
        told = {*self.body.values(), *self.places}
        if not told & {"email", "external_id"}:
            raise ValueError("body: neither `email` nor `external_id` is in it, so the service cannot know whose event it is")
        if "key" not in told and not (self.key_header and self.batch == 1) and not self.idempotent:
            raise ValueError("body: `key` is missing, by which the service knows an event that comes again (or give key_header, with batch: 1)")
        if self.results and "key" not in told:
            raise ValueError("results: they need `key` in the body")
        return self


@contextmanager
def writer(connection: Connection, send: Send, secret: Callable[[str], str]) -> Iterator[Writer]:
    session = open_session(connection, secret)
    base = connection.url.rstrip("/")

    def tell(events: Sequence[Event]) -> list[Verdict]:
        documents = [document(send, event) for event in events]
        body: Any = documents[0] if send.batch == 1 and not send.items else {send.items: documents} if send.items else documents
        headers = dict(connection.headers)
        path = address(send, events[0]) if send.places else send.path
        if send.key_header:
            headers[send.key_header] = _key_of([event["key"] for event in events])
        try:
            # A redirect would make a GET of it, and a success of that.
            response = session.request(send.method, f"{base}/{path.lstrip('/')}", json=body, headers=headers, allow_redirects=False)
        except LoginError:
            raise
        except SourceError as error:
            raise Unavailable(str(error)) from None
        status = response.status_code
        if status in _LATER:
            raise Unavailable(f"the service answers with status {status} ({response.reason})")
        if status in (401, 403):
            raise SourceError(f"the service refuses the login (status {status} {response.reason}): the token is wrong, has expired or may not write")
        if (status in _MISDIRECTED and not (send.places and status in _MISSING)) or 300 <= status < 400:
            raise SourceError(f"the service answers with status {status} ({response.reason}) to {send.method} {send.path}: check write_back.send")
        if status >= 400:
            words = " ".join(mask_addresses(response.text[:_MOST_WORDS]).split())
            raise Refused(f"status {status}: {words}" if words else f"status {status}")
        if send.errors:
            _check_errors(send.errors, response)
        return _verdicts(send.results, response, events) if send.results else [TAKEN] * len(events)

    with session:
        yield tell


def document(send: Send, event: Event) -> dict[str, Any]:
    """The JSON object of one event."""
    tree: dict[str, Any] = {}
    for name, value in (*send.constants.items(), *((name, event[field]) for name, field in send.body.items())):
        *path, last = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value.isoformat() if isinstance(value, dt.datetime) else value
    return tree


def address(send: Send, event: Event) -> str:
    """The path of one event. Raises `Refused` if a value cannot be a part of one: it would lead elsewhere."""

    def part(place: re.Match[str]) -> str:
        value = event[place[1]]
        if value is None or str(value) in ("", ".", ".."):
            raise Refused(f"the event has no {place[1]} that can stand in the path")
        return quote(value.isoformat() if isinstance(value, dt.datetime) else str(value), safe="")

    return _PLACE.sub(part, send.path)


def _check_errors(path: str, response: Any) -> None:
    """Raise `Refused` if there is something at `path`."""
    try:
        found = response.json()
        for name in path.split("."):
            found = found.get(name) if isinstance(found, dict) else None
    except ValueError:
        raise SourceError(f"the service's answer is no JSON, where {path!r} should say what is wrong: check write_back.send.errors") from None
    if found:
        raise Refused(" ".join(mask_addresses(str(found)[:_MOST_WORDS]).split()))


def _key_of(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else hashlib.blake2b("\n".join(keys).encode(), digest_size=16).hexdigest()


def _verdicts(results: Results, response: Any, events: Sequence[Event]) -> list[Verdict]:
    """An event of which the answer says nothing is sent again: its key makes that harmless."""
    try:
        found = response.json()
        for part in results.path.split("."):
            found = found[part]
        statuses = {str(entry[results.key]): int(entry[results.status]) for entry in found}
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"the service's answer has no list of results at {results.path!r} ({type(error).__name__}): check write_back.send.results") from None
    return [_verdict(statuses, event["key"]) for event in events]


def _verdict(statuses: Mapping[str, int], key: str) -> Verdict:
    status = statuses.get(key)
    if status is None:
        return Verdict("later", "the answer says nothing of it")
    if status in _LATER:
        return Verdict("later", f"status {status}")
    return Verdict("refused", f"status {status}") if status >= 400 else TAKEN
