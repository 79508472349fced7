"""How long a check waits for what may never answer.

What belongs here: connections and threads with a limit. What does not: what is asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.database.engine import open_engine, reading
from mail_pipelines.doctor.finding import Finding

# A database that takes connections may never answer. No question of ours takes it long.
ANSWER_SECONDS = 10.0
# Dagster and Celery connect to theirs themselves, several times, and wait without an end. A broker on a busy host is no quicker.
STORAGE_SECONDS = 30.0
HANGS = "look at its database and the host of that (full disk? no memory?)"


@contextmanager
def connected(settings: config.Settings) -> Iterator[sa.Connection]:
    """The central database, by the account of these settings."""
    engine = open_engine(settings.database, answer_seconds=ANSWER_SECONDS)
    try:
        with reading(engine) as connection:
            yield connection
    finally:
        engine.dispose()


def within(seconds: float, look: Callable[[], list[Finding]], late: Finding) -> list[Finding]:
    """What `look` finds; `late` if that takes longer. Its thread is left behind then, and keeps no process from ending."""
    try:
        return begun(look).result(seconds)
    except TimeoutError:
        return [late]


def begun(look: Callable[[], list[Finding]]) -> Future[list[Finding]]:
    """`look` in a thread of its own, which keeps no process from ending."""
    found: Future[list[Finding]] = Future()

    def work() -> None:
        try:
            found.set_result(look())
        except Exception as error:  # noqa: BLE001 (raised again where it is waited for)
            found.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return found
