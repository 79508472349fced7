"""What another system holds, in words that all of them share, and a read-only connection to its database.

What belongs here: the shapes that readers return, and how their databases are opened. What does not: what a system's tables mean (one module
each) and what becomes of the rows here (`running`).
"""

from __future__ import annotations

import datetime as dt
import itertools
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import sqlalchemy as sa

from mail_pipelines.contacts.fields import FieldType
from mail_pipelines.errors import MailPipelinesError

# Rows of one page, and so of one transaction here.
PAGE_ROWS = 10_000
# Values of a field by which its type is checked.
SAMPLE = 1_000

# How a subscriber stands in a list there. `bounced` and `blocked` are on the list and mailed nothing; `disabled` is every other way of not being mailed.
State = Literal["active", "unconfirmed", "left", "bounced", "blocked", "disabled"]


class MigrationError(MailPipelinesError):
    """A database or file of another system that cannot be read as one."""


@dataclass(frozen=True)
class SourceList:
    id: int
    name: str


@dataclass(frozen=True)
class SourceField:
    """A custom field; `type` is the one of ours that its own type says, which its values may disprove."""

    id: Hashable
    label: str
    type: FieldType


@dataclass(slots=True)
class Person:
    """One row of a list. `since` is when the state began, if known. `blocked` is the reason of a suppression everywhere. `values` are texts by field id."""

    id: int
    email: str
    state: State
    since: dt.datetime | None = None
    blocked: str | None = None
    evidence: dict[str, Any] = field(default_factory=dict)
    values: dict[Hashable, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """Up to `PAGE_ROWS` rows of one list; `rejects` are place and reason of rows that could not be read at all."""

    people: Sequence[Person]
    rejects: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True)
class Ban:
    """An address, or (without `@`, or with nothing before it) a domain, that is not mailed, in one list or in none."""

    target: str
    reason: str
    since: dt.datetime | None = None
    list_id: int | None = None


@dataclass(frozen=True)
class Bounce:
    """A message that came back, or (`complaint`) was called spam. `key` is its number there."""

    key: str
    email: str
    kind: Literal["hard", "soft", "complaint"]
    at: dt.datetime | None
    text: str = ""


class Source(ABC):
    """A system to move from."""

    name: ClassVar[str]

    @abstractmethod
    def lists(self) -> Sequence[SourceList]:
        """All lists, oldest first."""

    @abstractmethod
    def fields(self) -> Sequence[SourceField]:
        """All custom fields. Those whose labels give the same key become one field here."""

    @abstractmethod
    def sample(self, field: SourceField) -> Sequence[str]:
        """Some values of a field, at most `SAMPLE`, as `pages` gives them."""

    @abstractmethod
    def pages(self, list_: SourceList, *, left: bool) -> Iterator[Page]:
        """The rows of a list that have left it, or all others."""

    def counts(self, list_: SourceList) -> Mapping[State, int] | None:
        """How many rows of each state the system itself counts in a list; None if it cannot be asked."""
        return None

    def bans(self) -> Iterator[Sequence[Ban]]:
        return iter(())

    def bounces(self) -> Iterator[Sequence[Bounce]]:
        return iter(())


class DatabaseSource(Source):
    """A system whose database is read, page by page along its keys, so that neither side holds more than a page."""

    # The table, without prefix, by which an installation is known.
    known_by: ClassVar[str]

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        names = sa.inspect(engine).get_table_names()
        found = [name.removesuffix(self.known_by) for name in names if name.endswith(self.known_by)]
        prefixes = sorted(prefix for prefix in found if self.is_ours(prefix, names))
        if len(prefixes) != 1:
            tables = f"more than one: with the prefixes {', '.join(prefixes)}" if prefixes else "none"
            raise MigrationError(
                f"expected the tables of one {self.name} in this database, found {tables}; give the URL of the right database, or an account that "
                "sees the tables of one installation only"
            )
        self.prefix = prefixes[0]
        self.tables = frozenset(name.removeprefix(self.prefix) for name in names if name.startswith(self.prefix))

    @classmethod
    @abstractmethod
    def is_ours(cls, prefix: str, names: Sequence[str]) -> bool:
        """Whether tables with this prefix are this system's."""

    def table(self, name: str, *columns: str) -> sa.TableClause:
        """A table with columns whose values come as the driver gives them."""
        return sa.table(self.prefix + name, *map(sa.column, columns))

    def rows(self, query: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
        with self.engine.connect() as connection:
            return connection.execute(query).all()

    def keyset(self, query: sa.Select[Any], key: sa.ColumnElement[Any]) -> Iterator[Sequence[sa.Row[Any]]]:
        """The rows of a query in pages, in the order of a unique column that it selects as `id`."""
        after: int | None = None
        while True:
            page = self.rows((query if after is None else query.where(key > after)).order_by(key).limit(PAGE_ROWS))
            if page:
                yield page
            if len(page) < PAGE_ROWS:
                return
            after = page[-1].id

    def values(self, query: sa.Select[Any], subscriber: sa.ColumnElement[Any], ids: Sequence[int]) -> Iterator[sa.Row[Any]]:
        """The rows of a query that belong to these subscribers."""
        for start in range(0, len(ids), 1_000):
            yield from self.rows(query.where(subscriber.in_(ids[start : start + 1_000])))

    def sampled(self, texts: Iterator[str]) -> list[str]:
        return list(itertools.islice((text for text in texts if text), SAMPLE))


_DRIVERS = {"mysql": "mysql+pymysql", "mariadb": "mariadb+pymysql", "postgresql": "postgresql+pg8000", "postgres": "postgresql+pg8000"}
_READ_ONLY = {"mysql": "SET SESSION TRANSACTION READ ONLY", "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"}


def open_database(url: str, *, family: Literal["mysql", "postgresql"]) -> sa.Engine:
    """An engine whose sessions can only read. Raises `MigrationError`, which never shows the password, if that is not possible."""
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise MigrationError(f"this is no database URL; expected one like {family}://USER:PASSWORD@HOST/DATABASE") from None
    parsed = parsed.set(drivername=_DRIVERS.get(parsed.drivername, parsed.drivername))
    if family not in parsed.drivername and not (family == "mysql" and parsed.drivername.startswith("mariadb")):
        raise MigrationError(f"expected the URL of a {family} database, found one of {parsed.drivername}")
    if family == "mysql":
        parsed = parsed.update_query_dict({"charset": "utf8mb4"})
    engine = sa.create_engine(parsed)

    @sa.event.listens_for(engine, "connect")
    def _only_read(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(_READ_ONLY[family])
        cursor.close()
        connection.commit()

    try:
        engine.connect().close()
    except (sa.exc.DBAPIError, sa.exc.InterfaceError, OSError) as error:
        reason = str(getattr(error, "orig", error)).replace(parsed.password or "\0", "***")
        raise MigrationError(f"the database {parsed.render_as_string()} cannot be read: {reason}") from None
    return engine
