"""The document that declares a source: one YAML file in the folder `sources` of the home.

    name: crm
    kind: rest
    connection: {url: "https://crm.example/api/", auth: {type: bearer, token_env: CRM_TOKEN}}
    schedule: "*/15 * * * *"
    contacts:
      read: {path: contacts, records: data, paging: {type: cursor, cursor_path: paging.next, cursor_param: after}, since_param: updated_after}
      map: {id: external_id, email: email, updated_at: changed_at, firstname: first_name, newsletter: opted_in}
      cursor: updated_at
      list: News
      consent: {subscribe: opted_in, evidence: double opt-in in the shop}
      conflict: {default: newest, first_name: ours}

What belongs here: names, types and rules of the document. What does not: what `connection` and `read` mean, which is the kind's (`kinds`), and what a
`recipe` completes a document with (`recipes`).
"""

from __future__ import annotations

import datetime as dt
import re
import zoneinfo
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

from mail_pipelines.contacts import fields
from mail_pipelines.contacts.fields import FieldType
from mail_pipelines.keys import InvalidKey, check_key
from mail_pipelines.sources.errors import DeclarationError

FOLDER = "sources"
# A subscription and a staging table carry it.
NAME_LENGTH = 32
Rule = Literal["newest", "ours", "theirs"]
Section = Literal["contacts", "suppressions"]
# What runs of a source: its sections, and writing back.
ENGAGEMENT: Literal["engagement"] = "engagement"
Part = Section | Literal["engagement"]
Told = Literal["opens", "clicks", "bounces", "unsubscribes", "suppressions"]
EMAIL, EXTERNAL_ID, CHANGED_AT, DELETED, OPTED_IN, OPTED_OUT, CONSENT_AT, TIME_ZONE, REASON = (
    *("email", "external_id", "changed_at", "deleted", "opted_in", "opted_out", "consent_at", "time_zone", "reason"),
)
# Targets of a mapping that are no fields of a contact.
CONTACT_TARGETS = frozenset({EMAIL, EXTERNAL_ID, CHANGED_AT, DELETED, OPTED_IN, OPTED_OUT, CONSENT_AT, TIME_ZONE})
SUPPRESSION_TARGETS = frozenset({EMAIL, REASON})
_ENVIRONMENT = re.compile(r"(?!MAIL_PIPELINES_)[A-Z][A-Z0-9_]{0,99}")
# Minute, hour, day, month, day of the week. What Dagster does not take for a schedule would keep all its definitions from being loaded.
_CRON_NUMBERS = (r"[0-5]?\d", r"(?:[01]?\d|2[0-3])", r"(?:[12]\d|3[01]|0?[1-9])", r"(?:1[0-2]|0?[1-9])", r"[0-7]")
_CRON_ITEMS = (rf"(?:\*|{number}(?:-{number})?)(?:/[1-9]\d*)?" for number in _CRON_NUMBERS)
_CRON = re.compile(" ".join(rf"{item}(?:,{item})*" for item in _CRON_ITEMS))


class Form(pydantic.BaseModel):
    """A part of the document: no key is taken that it does not know."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


def _environment_name(value: str) -> str:
    if not _ENVIRONMENT.fullmatch(value):
        raise ValueError("expected the name of an environment variable (A-Z, 0-9, _; not MAIL_PIPELINES_…), never the secret itself")
    return value


EnvironmentName = Annotated[str, pydantic.AfterValidator(_environment_name)]


def _zone_name(value: str) -> str:
    try:
        return zoneinfo.ZoneInfo(value).key
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{value!r} is no time zone, as Europe/Berlin is one") from None


ZoneName = Annotated[str, pydantic.AfterValidator(_zone_name)]


class Consent(Form):
    """Who is subscribed: `always`, `never`, or whose column mapped to `opted_in` is true. `evidence` is kept with whoever is subscribed by it.

    Where that column has words instead: `agreed` are those that say yes, `left` those of somebody who was subscribed there and left.
    """

    subscribe: Literal["always", "opted_in", "never"]
    evidence: str = pydantic.Field(default="", max_length=500)
    agreed: list[str] = []
    left: list[str] = []


class Deletions(Form):
    """What follows when a record is gone at the source: the subscription that the source made ends, or is kept.

    More than `share` of the source's records at once (and more than `at_least`), or all of them, is not believed until somebody says so.
    """

    then: Literal["end", "keep"] = "end"
    share: float = pydantic.Field(default=0.1, ge=0, le=1)
    at_least: int = pydantic.Field(default=5, ge=0)


class _Resource(Form):
    read: dict[str, Any] = {}
    map: dict[str, str]
    # A column by which the source can be asked for what changed since; `overlap` is asked for again (seconds, or the column's own unit if it is a number).
    cursor: str | None = None
    overlap: float = pydantic.Field(default=300, ge=0)
    # Where there is a cursor: so often everything is read all the same, which is how deletions and what a cursor missed are noticed.
    whole_hours: float = pydantic.Field(default=168, gt=0)
    # More rows than this are no source but an endless page.
    max_rows: int = pydantic.Field(default=50_000_000, ge=1)

    def column_of(self, target: str) -> str | None:
        return next((column for column, name in self.map.items() if name == target), None)

    @pydantic.model_validator(mode="after")
    def _has_addresses_once(self) -> _Resource:
        targets = list(self.map.values())
        if EMAIL not in targets:
            raise ValueError("map: no column becomes `email`")
        if twice := sorted({target for target in targets if targets.count(target) > 1}):
            raise ValueError(f"map: two columns become `{twice[0]}`")
        return self


class Contacts(_Resource):
    list: str | None = None
    types: dict[str, FieldType] = {}
    consent: Consent
    conflict: dict[str, Rule] = {"default": "theirs"}
    deletions: Deletions = Deletions()

    @property
    def says_who_left(self) -> tuple[str, ...]:
        """The targets that say who left; a source without their columns must not be read."""
        return tuple(target for target in (OPTED_OUT, *([OPTED_IN] if self.consent.left else [])) if self.column_of(target))

    @property
    def field_columns(self) -> dict[str, str]:
        """Column → field key of what becomes a field."""
        return {column: target for column, target in self.map.items() if target not in CONTACT_TARGETS}

    def rule_of(self, key: str) -> Rule:
        return self.conflict.get(key, self.conflict.get("default", "theirs"))

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> Contacts:
        known = {*self.field_columns.values(), *({TIME_ZONE} & set(self.map.values()))}
        for key in self.field_columns.values():
            try:
                fields.check_key(key)
            except fields.FieldError as error:
                raise ValueError(f"map: {error}") from None
        for place, keys in (("types", set(self.types)), ("conflict", set(self.conflict) - {"default"})):
            if unknown := sorted(keys - known):
                raise ValueError(f"{place}.{unknown[0]}: no column becomes this field")
        if self.consent.subscribe != "never" and not self.list:
            raise ValueError("list: is missing; or say consent: {subscribe: never}")
        if (self.consent.subscribe == "opted_in" or self.consent.agreed or self.consent.left) and not self.column_of(OPTED_IN):
            raise ValueError("consent: opted_in, agreed or left needs a column that is mapped to `opted_in`")
        if self.says_who_left and not self.list:
            raise ValueError("list: is missing, which those leave whose column says that they left")
        if "newest" in {self.rule_of(key) for key in known} and not self.column_of(CHANGED_AT):
            raise ValueError("conflict: `newest` needs a column that is mapped to `changed_at`")
        if self.cursor and self.cursor not in self.map and not self.column_of(EXTERNAL_ID):
            raise ValueError("cursor: a source that is read in parts needs a column that is mapped to `external_id`")
        return self


class Suppressions(_Resource):
    """Addresses that must not be mailed: in every list, in those of one brand or in one list. A column mapped to `reason` says why, else `reason` does."""

    scope: str = pydantic.Field(default="all", pattern=r"^(all|brand \S+|list \S+)$")
    reason: Literal["unsubscribe", "complaint", "bounce", "manual"] = "unsubscribe"

    @pydantic.model_validator(mode="after")
    def _knows_targets(self) -> Suppressions:
        if unknown := sorted(set(self.map.values()) - SUPPRESSION_TARGETS):
            raise ValueError(f"map: {unknown[0]!r} is not known here; expected {', '.join(sorted(SUPPRESSION_TARGETS))}")
        return self


class WriteBack(Form):
    """What the source is told. `send` says how, and is checked by the kind; it maps fields of an event (`kinds.EVENT_FIELDS`).

    Whoever the source does not know is left out, or, with `unknown: create`, sent without `external_id`. `since` leaves out what is older. With `lists: own`
    only the ends of subscriptions to the list of `contacts` are told: for a service that knows one subscription and no lists.
    """

    what: Annotated[list[Told], pydantic.Field(min_length=1)]
    send: dict[str, Any]
    unknown: Literal["skip", "create"] = "skip"
    lists: Literal["all", "own"] = "all"
    since: dt.date | None = None

    @property
    def begin(self) -> dt.datetime:
        """Nothing that happened before is told."""
        return dt.datetime.combine(self.since or dt.date(1970, 1, 1), dt.time(), dt.UTC)


class Source(Form):
    """One source. `connection`, the `read` of each section and the `send` of `write_back` are checked by its kind."""

    name: str
    kind: str
    connection: dict[str, Any] = {}
    schedule: str | None = None
    time_zone: ZoneName = "UTC"
    # A copy older than this is not fresh.
    fresh_hours: float = pydantic.Field(default=24, gt=0)
    contacts: Contacts | None = None
    suppressions: Suppressions | None = None
    write_back: WriteBack | None = None

    @property
    def parts(self) -> list[Part]:
        """What runs of it, in this order; each is an asset."""
        return [*self.sections, *([ENGAGEMENT] if self.write_back else [])]

    @property
    def sections(self) -> dict[Section, Contacts | Suppressions]:
        """What is read of it, suppressions first: who left is not subscribed for a moment."""
        given: dict[Section, Contacts | Suppressions | None] = {"suppressions": self.suppressions, "contacts": self.contacts}
        return {section: resource for section, resource in given.items() if resource is not None}

    @pydantic.model_validator(mode="after")
    def _is_usable(self) -> Source:
        try:
            check_key(self.name, "source name")
        except InvalidKey as error:
            raise ValueError(f"name: {error}") from None
        if len(self.name) > NAME_LENGTH:
            raise ValueError(f"name: more than {NAME_LENGTH} characters")
        if not self.sections:
            raise ValueError("contacts or suppressions: one of them is needed")
        if self.write_back and self.write_back.unknown == "skip" and not self.contacts:
            raise ValueError("write_back: nobody is known where no contacts are read; say unknown: create, or declare contacts")
        if self.write_back and self.write_back.lists == "own" and not (self.contacts and self.contacts.list):
            raise ValueError("write_back.lists: own is the list of contacts, and none is named there")
        if self.schedule is not None and not _CRON.fullmatch(self.schedule):
            raise ValueError("schedule: expected five fields of cron, in numbers, as in '*/15 * * * *'")
        return self


def parse(text: str, where: str) -> Source:
    """The source that a YAML text declares. Raises `DeclarationError`, naming `where` and the place."""
    from mail_pipelines.sources import kinds, recipes

    try:
        tree = yaml.safe_load(text)
        if not isinstance(tree, Mapping):
            raise DeclarationError("expected a mapping with name, kind, connection and contacts or suppressions")
        source = Source.model_validate(recipes.complete(tree))
        for resource in source.sections.values():
            kinds.check_form(source.kind, source.connection, resource.read)
        if source.write_back:
            kinds.check_send(source.kind, source.write_back.send, source.write_back.what)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise DeclarationError(f"{where}: {f'line {mark.line + 1}: ' if mark else ''}no valid YAML") from error
    except pydantic.ValidationError as error:
        raise DeclarationError(f"{where}: {first_problem(error)}") from None
    except (ValueError, DeclarationError) as error:
        raise DeclarationError(f"{where}: {error}") from None
    return source


def first_problem(error: pydantic.ValidationError) -> str:
    """`place: what is wrong`, without the value: it may be a secret."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    words = first["msg"].removeprefix("Value error, ")
    return f"{place}: {words}" if place else words


def read_file(path: Path) -> Source:
    """The source of a file called as it. Raises `DeclarationError`."""
    try:
        source = parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DeclarationError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if source.name != path.stem:
        raise DeclarationError(f"{path}: name: {source.name!r} is not the name of the file")
    return source


def files(home: Path) -> Iterator[Path]:
    """The files of all sources, by name."""
    yield from sorted((home / FOLDER).glob("*.yaml"))


def load(home: Path, name: str) -> Source:
    """The source of this name. Raises `DeclarationError`, which names the nearest."""
    from mail_pipelines.errors import nearest

    path = home / FOLDER / f"{check_key(name, 'source name')}.yaml"
    if not path.is_file():
        raise DeclarationError(f"there is no source {name!r} ({path}); {nearest(name, [file.stem for file in files(home)])}")
    return read_file(path)
