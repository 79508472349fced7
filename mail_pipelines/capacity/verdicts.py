"""What the plan in force says of each server made here: whether it is kept, and why.

What belongs here: the verdict, as it is kept with a plan and read by whoever shows it or acts on it. What does not: how it is found (`retiring`, `idle`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy.engine import Connection

from mail_pipelines.capacity import in_force

# A plan that is older says nothing any more: one is made at least once a day.
_FRESH = dt.timedelta(hours=26)


@dataclass(frozen=True)
class Verdict:
    """Whether a server is kept, and why in words. One that is to go is so since `since`, and `due` when it is to be given back now."""

    server: str
    pool: str
    keep: bool
    why: str
    saves_per_month: float = 0.0
    since: dt.date | None = None
    due: bool = False


def to_give_back(gone: Iterable[str], verdicts: Iterable[Verdict], serving: Collection[str], *, leaving: bool) -> dict[str, str]:
    """The servers to give back now, and why: those that are out of service for good, or else one that is not needed, if none is `leaving`."""
    reasons = {key: "it was taken out of service, and nobody took it back" for key in gone if key in serving}
    return reasons or ({} if leaving else {one.server: one.why for one in verdicts if one.due and one.server in serving})


def to_document(verdict: Verdict) -> dict[str, Any]:
    return asdict(verdict) | {"since": None if verdict.since is None else verdict.since.isoformat()}


def from_document(values: Mapping[str, Any]) -> Verdict:
    """The verdict that `to_document` wrote."""
    return Verdict(**{**values, "since": None if values["since"] is None else dt.date.fromisoformat(values["since"])})


def standing(connection: Connection, now: dt.datetime) -> Mapping[str, Verdict]:
    """The verdicts of the plan in force, by server; none of a plan that is too old."""
    kept = in_force.read(connection)
    if kept is None or now - kept.made_at > _FRESH:
        return {}
    return {values["server"]: from_document(values) for values in kept.document.get("idle", ())}
