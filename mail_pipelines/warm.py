"""What the code server and the process of which its runs are forks import first (`code_server`)."""

from __future__ import annotations

import contextlib
import importlib

from mail_pipelines.imports import uncollected

_NAMES = [
    "dagster._cli.api",
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
    "mail_pipelines.definitions",
]

with uncollected():
    for _name in _NAMES:
        # What is wrong with our definitions says whoever loads them, and names inside Dagster change.
        with contextlib.suppress(Exception):
            importlib.import_module(_name)
