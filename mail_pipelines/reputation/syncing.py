"""Asking a provider and keeping what it tells: all of the last weeks each time, so that late days come in and corrections win.

What belongs here: one run. A run that is killed has written all, some or none of the same rows; the next one writes the others.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections import Counter

from sqlalchemy.engine import Engine

from mail_pipelines.config import ReputationSettings
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.domains import store as domains
from mail_pipelines.reputation import google, microsoft, readings, standing
from mail_pipelines.reputation.readings import GOOGLE, MICROSOFT, Fetched
from mail_pipelines.reputation.standing import Standing
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds.http import PatientSession

# Days that are asked for each time. Microsoft is asked day by day.
_DAYS = {GOOGLE: 30, MICROSOFT: 7}
_ROWS = 5_000


def run(engine: Engine, settings: ReputationSettings, source: str, now: dt.datetime, session: PatientSession | None = None) -> Standing:
    """Ask a source and keep what it tells. Raises `SourceError` if it cannot be asked, which is noted, too."""
    try:
        fetched = _fetch(engine, settings, source, now.date(), session or PatientSession())
    except SourceError as error:
        with reading(engine) as connection:
            before = standing.read(connection, source)
        standing.keep(engine, source, dataclasses.replace(before, error=str(error)), now)
        raise
    counts: Counter[str] = Counter()
    for first in range(0, len(fetched.readings), _ROWS):
        portion = fetched.readings[first : first + _ROWS]
        counts += transact(engine, lambda connection, portion=portion: readings.keep(connection, portion, now))  # type: ignore[misc]
    after = Standing(now.isoformat(), dict(counts), dict(fetched.refused), dict(fetched.rejected))
    standing.keep(engine, source, after, now)
    return after


def _fetch(engine: Engine, settings: ReputationSettings, source: str, today: dt.date, session: PatientSession) -> Fetched:
    days = [today - dt.timedelta(days=back) for back in range(_DAYS[source], 0, -1)]
    if source == MICROSOFT:
        return microsoft.read(settings, days, session)
    with reading(engine) as connection:
        names = [one.names.domain for one in domains.all_domains(connection)]
    return google.read(settings, names, days[0], days[-1], session)
