"""Dagster's code server, whose runs begin at once: a process of its own, started by `up`.

Dagster starts every run in a new interpreter (multiprocessing's `spawn`), which imports for some five seconds of processor time before it does anything.
Here it is a fork of a process that has imported everything a send run needs and has no threads (`forkserver`).
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import sys
from multiprocessing.forkserver import ensure_running

LOCATION = "mail_pipelines"
_DEFINITIONS = "mail_pipelines.definitions"
_RUNS_IMPORT = [
    "dagster._grpc.impl",
    "dagster._core.storage.sqlite_storage",
    "dagster._core.run_coordinator.queued_run_coordinator",
    "dagster._core.launcher.default_run_launcher",
    "dagster._core.storage.local_compute_log_manager",
    "dagster._core.execution.api",
    "dagster._core.executor.in_process",
    "dagster._core.instance.factory",
    "dagster._core.secrets.env_file",
    # Dagster opens a store of definitions' states with every instance.
    "upath.implementations.local",
    "fsspec.implementations.local",
    _DEFINITIONS,
]


def main(host: str, port: str) -> None:
    """Serve until SIGTERM."""
    from dagster._cli.api import grpc_command

    warm = multiprocessing.get_context("forkserver")
    warm.set_forkserver_preload(_RUNS_IMPORT)
    # Dagster asks for `spawn` and has no setting for it.
    multiprocessing.context._concrete_contexts["spawn"] = warm  # type: ignore[attr-defined]
    ensure_running()
    place = ["--host", host, "--port", port, "--location-name", LOCATION]
    grpc_command(["--module-name", _DEFINITIONS, *place, "--use-python-environment-entry-point"])


if __name__ == "__main__":
    main(*sys.argv[1:])
