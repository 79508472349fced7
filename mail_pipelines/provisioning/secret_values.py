"""Taking secrets out of texts before they are logged or kept: whatever a command or a task says, it says by other people's code.

What belongs here: finding known values in a text. What does not: where they come from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

MASK = "********"
# Shorter lines would be found in words that are no secrets: `}`, `yes`.
_SHORTEST = 8


class Secrets:
    """Values to be masked, as they are, line by line (a key in PEM is printed so), and in the form of JSON."""

    def __init__(self, values: Iterable[str]) -> None:
        found = set()
        for value in values:
            for part in (value.strip(), *value.splitlines()):
                stripped = part.strip()
                # The frame of a key is no secret.
                if len(stripped) >= _SHORTEST and not stripped.startswith("-----"):
                    found |= {stripped, json.dumps(stripped)[1:-1]}
        self._values = sorted(found, key=len, reverse=True)

    @classmethod
    def of(cls, files: Iterable[Path]) -> Secrets:
        """All that these files hold; one that is not there has none."""
        return cls(path.read_text(encoding="utf-8", errors="replace") for path in files if path.is_file())

    def masked(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, MASK)
        return text
