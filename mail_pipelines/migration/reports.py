"""Reports of other systems as CSV files of their own: bounces and complaints of campaigns, and blacklists. What their columns mean is in `exports.toml`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from mail_pipelines.contacts.files import open_file
from mail_pipelines.migration import cleaning, exports
from mail_pipelines.migration.mailwizz import reason_of
from mail_pipelines.migration.source import Ban, Bounce, MigrationError, Page, Source, SourceField, SourceList

_ROLES = ("email", "kind", "reason", "text", "at")


class Report(Source):
    """A file as a system without lists; it `holds` bounces, complaints or a blacklist. Raises `MigrationError` if the system writes no such file."""

    def __init__(self, system: str, path: Path, holds: str) -> None:
        self.name = system  # type: ignore[misc]
        self.path, self.holds = path, holds
        rules = exports.document()[system].get(holds)
        if rules is None:
            raise MigrationError(f"{system} exports no {holds}: read its database, or give the addresses by a source (docs/migration.md)")
        with open_file(path) as file:
            self._places = exports.places(rules, _ROLES, file.columns)

    def lists(self) -> Sequence[SourceList]:
        return []

    def fields(self) -> Sequence[SourceField]:
        return []

    def sample(self, field: SourceField) -> Sequence[str]:
        return []

    def pages(self, list_: SourceList, *, left: bool) -> Iterator[Page]:
        return iter(())

    def bans(self) -> Iterator[Sequence[Ban]]:
        for page in self._pages() if self.holds == "blacklist" else ():
            yield [Ban(row["email"], reason_of(row["reason"]), cleaning.time(row["at"])) for row in page]

    def bounces(self) -> Iterator[Sequence[Bounce]]:
        for page in self._pages() if self.holds != "blacklist" else ():
            yield [self._bounce(row) for row in page]

    def _bounce(self, row: Mapping[str, str]) -> Bounce:
        kind: Literal["hard", "soft", "complaint"] = "complaint" if self.holds == "complaints" else exports.kind_of(row["kind"])
        return Bounce(f"{self.holds} {exports.key_of(*row.values())}", row["email"], kind, cleaning.time(row["at"]), cleaning.text(row["text"]))

    def _pages(self) -> Iterator[Sequence[Mapping[str, str]]]:
        with open_file(self.path) as file:
            for batch in file.batches:
                found = [{role: next((row[place] for place in self._places[role]), "") for role in _ROLES} for _, row in exports.rows(batch)]
                # What cannot be read is counted with what has no address.
                yield [*found, *(dict.fromkeys(_ROLES, "") | {"email": "unreadable line"} for _ in batch.rejects)]
