"""What is known of a source as numbers, words and frames, for the asset that shows it."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy.engine import Engine

from mail_pipelines.capacity import told
from mail_pipelines.database.engine import reading
from mail_pipelines.reputation import readings, standing
from mail_pipelines.reputation.readings import DAY

if TYPE_CHECKING:
    import pandas as pd

# Days of the picture.
SHOWN_DAYS = 30
_COLUMNS = ("subject", "day", "spam_rate", "delivery_errors", "filter_result", "trap_hits", "messages")


@dataclass(frozen=True)
class Report:
    """`table` is the newest reading of each subject, the worst first; `rates`: day, subject, spam_rate. `worst` is the highest newest spam rate.

    `problems`: why what is known may not be all; `bad`: what is at a limit of warm-ups.
    """

    count: int
    newest_day: str
    worst: float
    problems: list[str]
    bad: list[str]
    table: pd.DataFrame
    rates: pd.DataFrame


def read(engine: Engine, source: str, now: dt.datetime) -> Report:
    import pandas as pd

    with reading(engine) as connection:
        found = readings.read(connection, int(now.timestamp()) - SHOWN_DAYS * DAY, source=source)
        stale = standing.stale(connection, source, now)
        problems = [*([stale] if stale else []), *standing.read(connection, source).problems]
        bad = [one.words("back") for one in told.bad(connection, now) if one.signal.by == source]
    newest = sorted({one.subject: one for one in sorted(found, key=lambda one: one.day)}.values(), key=lambda one: (-(one.spam_rate or 0.0), one.subject))
    rows = [[str(readings.date_of(one.day)) if name == "day" else _shown(getattr(one, name)) for name in _COLUMNS] for one in newest]
    rates = [(pd.Timestamp(one.day, unit="s", tz="UTC"), one.subject, one.spam_rate) for one in found if one.spam_rate is not None]
    return Report(
        count=len(found),
        newest_day=str(readings.date_of(max(one.day for one in found))) if found else "none",
        worst=max((one.spam_rate or 0.0 for one in newest), default=0.0),
        problems=problems,
        bad=bad,
        table=pd.DataFrame(rows, columns=[*_COLUMNS], dtype=object),
        rates=pd.DataFrame(rates, columns=["day", "subject", "spam_rate"]),
    )


def _shown(value: object) -> object:
    return "" if value is None else f"{value:.2%}" if isinstance(value, float) else value
