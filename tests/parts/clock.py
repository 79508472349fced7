"""A host whose clock is off: `python -m tests.parts.clock 300 WORDS…` is `mail-pipelines WORDS…` on a host whose clock is 300 s ahead.

Only what Python's code asks for is another time. The monotonic clocks are not, nor is the time of SQLite and MariaDB; nor are the dates of files,
which on such a host would be off as well.
"""

from __future__ import annotations

import datetime
import sys
import time


def set_ahead(seconds: float) -> None:
    """Let this process read a clock that is so many seconds ahead of the true one (negative: behind)."""
    if not seconds:
        return
    true_time, true_time_ns, true_datetime = time.time, time.time_ns, datetime.datetime

    class Kind(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, true_datetime)

    class Ahead(true_datetime, metaclass=Kind):
        """Makes true ones, which others know."""

        def __new__(cls, *values, **named):  # type: ignore[no-untyped-def]
            return true_datetime(*values, **named)

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
            return true_datetime.fromtimestamp(time.time(), tz)

    time.time = lambda: true_time() + seconds
    time.time_ns = lambda: true_time_ns() + round(seconds * 1e9)
    datetime.datetime = Ahead  # type: ignore[misc]


if __name__ == "__main__":
    # First what takes classes for keys when it is imported: SQLAlchemy knows the type of a value by its class.
    import sqlalchemy  # noqa: F401

    from mail_pipelines import cli

    set_ahead(float(sys.argv.pop(1)))
    cli.main()
