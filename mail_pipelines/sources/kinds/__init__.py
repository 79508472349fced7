"""Kinds of sources: what `connection` and `read` of a declaration mean, and how the rows are got. One module a kind; none imports dlt before it is used.

A kind's module has two forms, `Connection` and `Read`, and `rows(connection, read, wanted)`, which yields pages: lists of mappings, or Arrow tables.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import pydantic

from mail_pipelines.errors import nearest
from mail_pipelines.sources.declaration import Form, first_problem
from mail_pipelines.sources.errors import DeclarationError, SourceError

KINDS = {"files": "files", "rest": "rest", "sheet": "sheet", "sql": "sql"}


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
