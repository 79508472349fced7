"""A reason to alert an operator."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """`key` names it as long as it lasts (`kind` and what it is about); `command` is what to type. It is told when it has lasted for `after`."""

    kind: str
    about: str
    text: str
    command: str
    after: dt.timedelta = dt.timedelta(0)

    @property
    def key(self) -> str:
        return f"{self.kind}:{self.about}" if self.about else self.kind
