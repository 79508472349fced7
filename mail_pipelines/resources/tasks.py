"""The Celery side of a run: the app that launcher and workers share, and the one task there is, which executes a run.

What belongs here: settings of Celery, and whether an order is followed. What does not: where runs go (`queues`), publishing (`launcher`),
what a worker does at its end (`worker`).
"""

from __future__ import annotations

import os
import signal
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dagster as dg
from celery import Celery
from celery.app.control import Control
from dagster._cli.api import _execute_run_command_body
from dagster._core.code_pointer import ModuleCodePointer
from dagster._utils.interrupts import capture_interrupts

from mail_pipelines import config
from mail_pipelines.config import ConfigError, Settings
from mail_pipelines.dispatch.files import AlreadyRunning, ServerFolders, is_locked, only_one

# The dialect is named by the URL of Dagster's storage on a server.
from mail_pipelines.resources import orders, queues, results, views_dialect  # noqa: F401
from mail_pipelines.resources.orders import OrderRefused

EXECUTE_RUN = "mail_pipelines.execute_run"
_FOLDER_BROKER = "mail_pipelines.resources.folder_broker:Transport"
_DEFINITIONS = "mail_pipelines.definitions"
# Longer than any run may take (`max_runtime_seconds` in dagster.yaml): a run without a result would be one of which nobody knows whether it works.
RESULT_SECONDS = 7 * 24 * 3600
# Children take new definitions only with a new worker, and memory that grew goes with the child.
_RUNS_OF_A_CHILD = 50
# The result of a second order for a run. It takes the place of the first one's while that works.
IGNORED = -1


def make_app(settings: Settings, server: str | None = None) -> Celery:
    """The Celery app of the centre, or of one dispatch server. Raises `ConfigError` if broker or results are not set."""
    given = settings.broker
    if not given.url or not given.results:
        raise ConfigError("broker.url and broker.results are not set: runs cannot be carried to workers (docs/production.md)")
    app = Celery("mail_pipelines", backend=_results(given.results))
    app.conf.update(
        **_broker(given.url, given.ca),
        broker_connection_retry_on_startup=True,
        # For ever: a broker that is away for a night must not end the workers.
        broker_connection_max_retries=None,
        # A lost connection must not end sessions that need no broker.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        task_default_queue=queues.CENTRE,
        task_queue_max_priority=10,
        task_default_priority=5,
        task_publish_retry_policy={"max_retries": 3, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.5},
        # Acknowledged when it begins: whose host dies is not done again by another. Only the ledger decides what is open.
        task_acks_late=False,
        task_track_started=True,
        result_expires=RESULT_SECONDS,
        # A database that restarts while a run begins or ends.
        result_backend_always_retry=True,
        result_backend_max_retries=20,
        result_backend_max_sleep_between_retries_ms=3000,
        # What one worker has fetched and not begun no other can begin.
        worker_prefetch_multiplier=1,
        worker_max_tasks_per_child=_RUNS_OF_A_CHILD,
        # Dagster writes the log of a run; Celery would write it a second time.
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        # Orders to workers (termination) go through an exchange of each server's own: a stolen one's account reaches no other.
        control_exchange=control_exchange(server),
        task_serializer="json",
        accept_content=["json"],
    )
    app.task(name=EXECUTE_RUN)(execute_run)
    return app


def _results(url: str) -> str:
    """Celery's name of a backend with its URL: in a database, `results` instead of Celery's own.

    Never `rpc://`, which is dagster-celery's default: its results are lost with the process that asked, so after a restart of the daemon runs that go on
    sending would be called failed.
    """
    return f"{results.__name__}:{results.Results.__name__}+{url.removeprefix('db+')}" if url.startswith("db+") else url


def control_exchange(server: str | None) -> str:
    return server or queues.CENTRE


def control(app: Celery, exchange: str) -> Control:
    """Remote control of the workers that listen to an exchange."""
    other = Control(app)
    other.mailbox.namespace = exchange
    other.mailbox.exchange = other.mailbox._get_exchange(exchange, "fanout")
    return other


def _broker(url: str, ca: str) -> dict[str, Any]:
    """Celery's settings of a broker. `filesystem:///FOLDER` is a broker for the processes of one host."""
    parts = urlsplit(url)
    if parts.scheme != "filesystem":
        # With it, what the broker has not confirmed is an error at once, and no run that waits for ever.
        settings: dict[str, Any] = {"broker_url": url, "broker_transport_options": {"confirm_publish": True}}
        if parts.scheme == "amqps":
            # By itself, Celery would encrypt for whomever it has reached.
            authority = ca or ssl.get_default_verify_paths().cafile
            settings["broker_use_ssl"] = {"ca_certs": authority, "cert_reqs": ssl.CERT_REQUIRED, "server_hostname": parts.hostname}
        return settings
    folder = Path(parts.path)
    for name in ("queue", "control", "done"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    queue = str(folder / "queue")
    options = {
        "data_folder_in": queue,
        "data_folder_out": queue,
        "control_folder": str(folder / "control"),
        # A message is fetched by moving its file there, which has to be one step.
        "processed_folder": str(folder / "done"),
        "store_processed": True,
    }
    return {"broker_url": "filesystem://", "broker_transport": _FOLDER_BROKER, "broker_transport_options": options}


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
