"""What an operator has to know of external sources: declarations that cannot be read, runs that fail or were cut off, copies that grow old, dead letters.

What belongs here: what of a source's standing is worth an alert. What does not: host sources, from which servers are bought (`causes`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy.engine import Connection

from mail_pipelines.alerts.cause import Cause
from mail_pipelines.sources import declaration, outbox, running, status
from mail_pipelines.sources.declaration import Part, Source
from mail_pipelines.sources.errors import DeclarationError
from mail_pipelines.sources.status import Standing

# A service may be away for a run.
AWAY_FOR = dt.timedelta(minutes=30)


def causes(connection: Connection, home: Path, now: dt.datetime) -> Iterator[Cause]:
    """Of each declared source."""
    for path in declaration.files(home):
        try:
            source = declaration.read_file(path)
        except DeclarationError as error:
            yield Cause("external-source", path.stem, f"external source {path.stem} is not read: {error}", "mail-pipelines source list")
            continue
        yield from _of(connection, home, source, now)


def _of(connection: Connection, home: Path, source: Source, now: dt.datetime) -> Iterator[Cause]:
    standings = {part: status.of(connection, source.name, part) for part in source.parts}
    wrong = {part: words for part, standing in standings.items() if (words := running.wrong(home, source.name, standing))}
    # What follows upon a part that failed is old for that reason.
    for part, words in (wrong or _old(source, standings, now)).items():
        good = standings[part].good_at
        last = f"; in step at {dt.datetime.fromisoformat(good):%Y-%m-%d %H:%M} UTC for the last time" if good else "; it never was in step"
        text = f"external source {source.name}, {part}: {words}{last}"
        yield Cause("external-source", f"{source.name}:{part}", text, f"mail-pipelines source run {source.name}", AWAY_FOR)
    if source.write_back and (dead := outbox.standing(connection, source.name).dead):
        text = f"external source {source.name} refused {dead:,} events, which are in its dead letters"
        yield Cause("dead-letters", source.name, text, f"mail-pipelines source dead-letters {source.name}")


def _old(source: Source, standings: dict[Part, Standing], now: dt.datetime) -> dict[Part, str]:
    """What is older than it may be, of a source that is read by a schedule: its runs do not begin."""
    found: dict[Part, str] = {}
    for part, standing in standings.items():
        lag = standing.lag_seconds(now)
        if source.schedule and lag is not None and lag > source.fresh_hours * 3600:
            found[part] = f"{lag / 3600:.0f} hours old, and was to be {source.fresh_hours:g} at most (fresh_hours): do its schedule and Dagster's daemon run?"
    return found
