"""Telling a REST API: events as JSON, in batches, each with its key. Values are values of the document, never part of an address or a header."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import pydantic

from mail_pipelines.delivery.events import mask_addresses
from mail_pipelines.sources.declaration import Form
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds import TAKEN, Event, EventField, Refused, Unavailable, Verdict, Writer
from mail_pipelines.sources.kinds.rest import Connection, login

# As `http.PatientSession` asks again after.
_LATER = frozenset({408, 425, 429, 500, 502, 503, 504})
# These say that the request is wrong, not what is in it.
_MISDIRECTED = frozenset({404, 405, 410, 415})
_MOST_WORDS = 300


class Results(Form):
    """Where an answer says what became of each event: a list at `path`, whose entries have the event's key and a status as of HTTP."""

    path: str
    key: str = "key"
    status: str = "status"


class Send(Form):
    """`body` maps names of the service to fields of an event, `constants` has what is always the same; a dot leads into a nested value.

    The events are a list, under the name `items` if there is one; with `batch: 1` and no `items` an event is the whole document.
    `key_header` is a header that takes the key of the request: the event's if there is one event, else a digest of theirs.
    """

    path: str
    method: Literal["POST", "PUT", "PATCH"] = "POST"
    batch: int = pydantic.Field(default=100, ge=1, le=10_000)
    items: str | None = None
    body: Annotated[dict[str, EventField], pydantic.Field(min_length=1)]
    constants: dict[str, str | int | float | bool] = pydantic.Field(default={})
    key_header: str | None = pydantic.Field(default=None, pattern=r"^[A-Za-z0-9-]{1,64}$")
    results: Results | None = None

    @pydantic.model_validator(mode="after")
    def _says_whose_and_which(self) -> Send:
        told = set(self.body.values())
        if not told & {"email", "external_id"}:
            raise ValueError("body: neither `email` nor `external_id` is in it, so the service cannot know whose event it is")
        if "key" not in told and not (self.key_header and self.batch == 1):
            raise ValueError("body: `key` is missing, by which the service knows an event that comes again (or give key_header, with batch: 1)")
        if self.results and "key" not in told:
            raise ValueError("results: they need `key` in the body")
        return self


@contextmanager
def writer(connection: Connection, send: Send, secret: Callable[[str], str]) -> Iterator[Writer]:
    from mail_pipelines.sources.kinds.http import PatientSession

    session = PatientSession(first_wait_seconds=connection.first_wait_seconds)
    session.auth = login(connection.auth, secret)
    url = f"{connection.url.rstrip('/')}/{send.path.lstrip('/')}"

    def tell(events: Sequence[Event]) -> list[Verdict]:
        documents = [document(send, event) for event in events]
        body: Any = documents[0] if send.batch == 1 and not send.items else {send.items: documents} if send.items else documents
        headers = dict(connection.headers)
        if send.key_header:
            headers[send.key_header] = _key_of([event["key"] for event in events])
        try:
            # A redirect would make a GET of it, and a success of that.
            response = session.request(send.method, url, json=body, headers=headers, allow_redirects=False)
        except SourceError as error:
            raise Unavailable(str(error)) from None
        status = response.status_code
        if status in _LATER:
            raise Unavailable(f"the service answers with status {status} ({response.reason})")
        if status in (401, 403):
            raise SourceError(f"the service refuses the login (status {status}): the token is wrong, has expired or may not write")
        if status in _MISDIRECTED or 300 <= status < 400:
            raise SourceError(f"the service answers with status {status} ({response.reason}) to {send.method} {send.path}: check write_back.send")
        if status >= 400:
            words = " ".join(mask_addresses(response.text[:_MOST_WORDS]).split())
            raise Refused(f"status {status}: {words}" if words else f"status {status}")
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
