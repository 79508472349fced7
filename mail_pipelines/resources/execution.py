"""The one task of workers, which executes the run of an order: whether it is followed, and that it is alone.

What belongs here: what happens between an order and Dagster. What does not: settings of Celery (`tasks`), signatures (`orders`), where runs go (`queues`).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import dagster as dg
from dagster._cli.api import _execute_run_command_body
from dagster._core.code_pointer import ModuleCodePointer
from dagster._utils.interrupts import capture_interrupts

from mail_pipelines import config
from mail_pipelines.config import Settings
from mail_pipelines.dispatch.files import AlreadyRunning, ServerFolders, is_locked, only_one

# The dialect is named by the URL of Dagster's storage on a server.
from mail_pipelines.resources import orders, queues, views_dialect  # noqa: F401
from mail_pipelines.resources.orders import OrderRefused
from mail_pipelines.resources.tasks import IGNORED

_DEFINITIONS = "mail_pipelines.definitions"


@contextmanager
def _own_signals() -> Iterator[None]:
    """Remember a signal that comes before Dagster is ready for it, and leave behind the handlers of the pool.

    Celery's children ignore SIGINT, and Dagster copies SIGINT's handler to SIGTERM when a run ends: the next run's child could not be ended.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with capture_interrupts():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def execute_run(text: object = None, signature: object = None) -> int:
    """Execute the run of an order; 0 if it ended well, 1 if not, `IGNORED` if it has begun before. Raises `OrderRefused`."""
    with _own_signals():
        settings = config.load()
        if not settings.broker.verify_key:
            raise OrderRefused("broker.verify_key is not set, so no order can be verified: it is on the centre's `config show`")
        order = orders.read(text, signature, settings.broker.verify_key)
        with _speaking_for_one(order.queue) as server, dg.DagsterInstance.get() as instance, _only_here(settings, order.run_id) as alone:
            record = instance.get_run_record_by_id(order.run_id)
            if record is None:
                raise OrderRefused(f"there is no run {order.run_id}")
            run = record.dagster_run
            if not alone or run.is_finished or record.start_time is not None:
                # The broker delivers twice what it is not sure to have delivered.
                return IGNORED
            if run.status is dg.DagsterRunStatus.CANCELING:
                instance.report_run_canceled(run, "Cancelled before it began.")
                return 0
            if (reason := refusal(run, order.queue, server)) is not None:
                instance.report_run_failed(run, reason)
                raise OrderRefused(reason)
            # Dagster's own body of a run process, as dagster-celery's task has it.
            return _execute_run_command_body(run.run_id, instance, lambda _event: None, set_exit_code_on_failure=True)


@contextmanager
def _speaking_for_one(queue: str) -> Iterator[str | None]:
    """Speak for one of the servers of this host alone, as long as the run from a queue lasts: that whose queue it is.

    A run of the queue of all goes to the server with the fewest sessions. One of nobody's here is for `refusal` to see.
    """
    servers = config.servers_of_this_host()
    if len(servers) < 2:
        yield queues.this_server()
        return
    server = queues.server_of(queue, servers) or min(servers, key=_sessions)
    before = os.environ[config.SERVER_VARIABLE]
    os.environ[config.SERVER_VARIABLE] = server
    try:
        yield server
    finally:
        os.environ[config.SERVER_VARIABLE] = before


def _sessions(server: str) -> int:
    folder = ServerFolders.of(config.load_for(server).server, server).sessions
    return sum(map(is_locked, folder.glob("*")))


@contextmanager
def _only_here(settings: Settings, run_id: str) -> Iterator[bool]:
    """Whether no other child has an order for the run at this moment: two that begin at once would both find that it has not begun."""
    place = Path(settings.server.run_folder) / "orders" / run_id
    with ExitStack() as stack:
        try:
            stack.enter_context(only_one(place, f"run {run_id}"))
        except AlreadyRunning:
            yield False
            return
        stack.callback(place.unlink, missing_ok=True)
        yield True


def refusal(run: dg.DagsterRun, queue: str, server: str | None) -> str | None:
    """Why a run must not execute here; None if it may."""
    # Who can write into Dagster's storage can name any code there.
    code = run.job_code_origin.repository_origin.code_pointer if run.job_code_origin else None
    if not isinstance(code, ModuleCodePointer) or code.module != _DEFINITIONS:
        return f"this run is not of {_DEFINITIONS}, and workers execute nothing else: it is refused"
    own = queues.own_queues(server)
    here = f"speaks for server {server}" if server else "is the centre's"
    if queue not in own:
        return f"this run is meant for queue {queue}, but this worker {here} (it may execute those of {', '.join(own)}): it is refused"
    if server and not queues.is_for_servers(run):
        return f"{run.job_name} executes only at the centre, but this worker {here}: it is refused"
    return None
