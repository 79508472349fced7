"""What a check of a server found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """`ok` is None where it could not be told, which is no failure. `text` says what was found and, unless `ok`, what to do."""

    name: str
    ok: bool | None
    text: str

    @property
    def word(self) -> str:
        return "ok" if self.ok else "unknown" if self.ok is None else "failed"
