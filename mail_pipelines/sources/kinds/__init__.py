"""Kinds of sources: what `connection` and `read` of a declaration mean, and how the rows are got. One module a kind; none imports dlt before it is used.

A kind's module has two forms, `Connection` and `Read`, and `rows(connection, read, wanted)`, which yields pages: lists of mappings, or Arrow tables.
A kind that can be told something has a second module with the form `Send` and `writer(connection, send, secret)`, which gives a `Writer`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import pydantic

from mail_pipelines.errors import nearest
from mail_pipelines.sources.declaration import Form, first_problem
from mail_pipelines.sources.errors import DeclarationError, SourceError

KINDS = {"files": "files", "rest": "rest", "sheet": "sheet", "sql": "sql"}
WRITERS = {"rest": "rest_writing", "sql": "sql_writing"}
# What an event that is told has; `key` is the same however often it is told. The last of them are empty where they do not apply.
EventField = Literal["key", "kind", "email", "external_id", "occurred_at", "campaign", "list", "url", "code", "enhanced", "reason", "text", "scope"]
EVENT_FIELDS: tuple[EventField, ...] = get_args(EventField)
Event = Mapping[str, Any]


class Unavailable(SourceError):
    """The service cannot take it now: try again later."""


class Refused(SourceError):
    """The service does not take these events, however often they are sent. Of several it is not said which."""


@dataclass(frozen=True)
class Verdict:
    """What became of one event: taken, to be sent again, or refused for good."""

    outcome: Literal["taken", "later", "refused"]
    reason: str = ""


TAKEN = Verdict("taken")
# Sends events and says of each, in their order, what became of it. Raises `Unavailable` or `Refused` if that holds for all of them.
Writer = Callable[[Sequence[Event]], list[Verdict]]


@dataclass(frozen=True)
class Wanted:
    """What is to be read: these columns (a dot leads into a nested value); if `since` is given, only rows whose `cursor` is that or later.

    A kind may give more rows than wanted. `secret` gives the value of an environment variable.
    """

    columns: tuple[str, ...]
    cursor: str | None
    since: str | None
    secret: Callable[[str], str]


class Kind(Protocol):
    Connection: type[Form]
    Read: type[Form]

    def rows(self, connection: Any, read: Any, wanted: Wanted) -> Iterator[Any]: ...


class WritingKind(Protocol):
    Send: type[Form]

    def writer(self, connection: Any, send: Any, secret: Callable[[str], str]) -> AbstractContextManager[Writer]: ...


def module(kind: str) -> Kind:
    """The module of a kind. Raises `DeclarationError`."""
    if kind not in KINDS:
        raise DeclarationError(f"kind: {kind!r} is not known; {nearest(kind, KINDS)}")
    return cast(Kind, importlib.import_module(f"{__name__}.{KINDS[kind]}"))


def check_form(kind: str, connection: Mapping[str, Any], read: Mapping[str, Any]) -> tuple[Form, Form]:
    """Both parts in the kind's forms. Raises `DeclarationError`, naming the place."""
    found = module(kind)
    forms = []
    for place, form, given in (("connection", found.Connection, connection), ("read", found.Read, read)):
        try:
            forms.append(form.model_validate(given))
        except pydantic.ValidationError as error:
            raise DeclarationError(f"{place}.{first_problem(error)}") from None
    return forms[0], forms[1]


def _writing(kind: str) -> WritingKind:
    if kind not in WRITERS:
        raise DeclarationError(f"write_back: a source of kind {kind} is only read; expected one of {', '.join(WRITERS)}")
    return cast(WritingKind, importlib.import_module(f"{__name__}.{WRITERS[kind]}"))


def check_send(kind: str, send: Mapping[str, Any], what: Sequence[str] = ()) -> Any:
    """`write_back.send` in the kind's form, which has at least `batch`, the most events of one request. Raises `DeclarationError`, naming the place.

    `what` is what is to be told; a form may say (`says`) that it tells nothing but this or that.
    """
    try:
        form = _writing(kind).Send.model_validate(send)
    except pydantic.ValidationError as error:
        raise DeclarationError(f"write_back.send.{first_problem(error)}") from None
    says = getattr(form, "says", None)
    if says is not None and (other := next((told for told in what if told not in says), None)):
        raise DeclarationError(f"write_back.what: {other} cannot be told by this request, which says only {', '.join(says)}: give another send")
    return form


def writer(kind: str, connection: Mapping[str, Any], send: Mapping[str, Any]) -> AbstractContextManager[Writer]:
    """What events are sent by, for as long as the block runs."""
    return _writing(kind).writer(module(kind).Connection.model_validate(connection), check_send(kind, send), secret)


def rows(kind: str, connection: Mapping[str, Any], read: Mapping[str, Any], wanted: Wanted) -> Iterator[Any]:
    """The pages of a source: lists of mappings, or Arrow tables."""
    forms = check_form(kind, connection, read)
    return module(kind).rows(*forms, wanted)


def secret(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """The value of an environment variable, or of the file that `NAME_FILE` names. Raises `SourceError`."""
    if value := environ.get(name):
        return value
    if path := environ.get(f"{name}_FILE"):
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{name}_FILE names a file that cannot be read: {getattr(error, 'strerror', None) or error}") from error
    raise SourceError(f"the environment variable {name} is not set (nor {name}_FILE); the source needs it to log in")
