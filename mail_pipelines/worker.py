"""What `celery -A mail_pipelines.worker worker` loads: the app of this host, and the definitions, once for all children.

`mail-pipelines worker run` starts it with the right queues.
"""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

from celery import signals
from celery.worker import state

from mail_pipelines import config
from mail_pipelines.imports import uncollected

with uncollected():
    # Before the children are forked: they share it.
    import mail_pipelines.definitions  # noqa: F401
    from mail_pipelines.resources import execution, queues, tasks

# Whoever opens Dagster's storage hears of each table.
logging.getLogger("alembic").setLevel(logging.WARNING)

app = tasks.make_app(config.load(), queues.this_server())
app.task(name=tasks.EXECUTE_RUN)(execution.execute_run)


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def end_sessions(**_: Any) -> None:
    """When the worker is told to end, tell its sessions: they finish what is in flight and release the rest, in place of sending for another hour.

    Runs of the centre are short, and waited for.
    """
    if queues.DISPATCH in app.amqp.queues.consume_from:
        for request in list(state.active_requests):
            if request.worker_pid:
                os.kill(request.worker_pid, signal.SIGTERM)
