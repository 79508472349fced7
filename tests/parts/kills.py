"""Killing work at any of its steps, as SIGKILL or a power loss would."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Sequence

import sqlalchemy as sa

from mail_pipelines.database.engine import create_engine

EVERY = ("before_cursor_execute", "commit")
# What was not committed is as if it had not been done: enough where no statement takes long, and much less to go through.
COMMITS = ("commit",)


def die_at(step: int, engine: sa.Engine, events: Sequence[str] = EVERY) -> Callable[..., None]:
    """Kill this process at the `step`th statement or commit of an engine; returns what counts one step more."""
    steps = 0

    def one_more(*_args: object) -> None:
        nonlocal steps
        steps += 1
        if steps == step:
            os.kill(os.getpid(), signal.SIGKILL)

    for event in events:
        sa.event.listen(engine, event, one_more)
    return one_more


def killed_at(step: int, url: str, work: Callable[[sa.Engine, Callable[..., None]], object], events: Sequence[str] = EVERY) -> bool:
    """Do `work` in another process, which is killed at its `step`th statement or commit; whether it came so far.

    `work` gets an engine of its own and what counts one step more, for steps that are none of the database's.
    """
    pid = os.fork()
    if pid == 0:
        try:
            engine = create_engine(url)
            work(engine, die_at(step, engine, events))
        except BaseException:  # noqa: BLE001 (a child of a test must not go on with the test)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def killed_throughout(url: str, work: Callable[[sa.Engine], object], most: int) -> int:
    """Do `work` in one process after another, each killed a commit later than the one before, until one gets to its end or `most` steps are tried; returns
    how many were killed. It begins with the second commit: with the first, such work only notes that it has begun.
    """
    steps = range(2, most)
    return next((kills for kills, step in enumerate(steps) if not killed_at(step, url, lambda own, _: work(own), COMMITS)), len(steps))
