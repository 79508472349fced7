"""The Celery side of a run: the app that launcher, workers and those who ask the broker share.

What belongs here: settings of Celery. What does not: what a worker does with an order (`execution`), where runs go (`queues`), publishing (`launcher`),
what a worker does at its end (`worker`); and Dagster, without which who only asks starts in half the time.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from celery import Celery
from celery.app.control import Control

from mail_pipelines.config import ConfigError, Settings
from mail_pipelines.resources import queues, results

EXECUTE_RUN = "mail_pipelines.execute_run"
# The result of a second order for a run. It takes the place of the first one's while that works.
IGNORED = -1
_FOLDER_BROKER = "mail_pipelines.resources.folder_broker:Transport"
# Longer than any run may take (`max_runtime_seconds` in dagster.yaml): a run without a result would be one of which nobody knows whether it works.
RESULT_SECONDS = 7 * 24 * 3600
# Children take new definitions only with a new worker, and memory that grew goes with the child.
_RUNS_OF_A_CHILD = 50


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
