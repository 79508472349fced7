"""Dagster's code server, whose runs begin at once: a process of its own, started by `up`.

Dagster starts every run in a new interpreter (multiprocessing's `spawn`), which imports for some five seconds of processor time before it does anything.
Here it is a fork of a process that has imported everything a send run needs and has no threads (`forkserver`).
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.context
import sys
from multiprocessing.forkserver import ensure_running

LOCATION = "mail_pipelines"
_DEFINITIONS = "mail_pipelines.definitions"
_WARM = "mail_pipelines.warm"


def main(host: str, port: str) -> None:
    """Serve until SIGTERM."""
    warm = multiprocessing.get_context("forkserver")
    warm.set_forkserver_preload([_WARM])
    # Dagster asks for `spawn` and has no setting for it.
    multiprocessing.context._concrete_contexts["spawn"] = warm  # type: ignore[attr-defined]
    ensure_running()
    importlib.import_module(_WARM)
    from dagster._cli.api import grpc_command

    place = ["--host", host, "--port", port, "--location-name", LOCATION]
    grpc_command(["--module-name", _DEFINITIONS, *place, "--use-python-environment-entry-point"])


if __name__ == "__main__":
    main(*sys.argv[1:])
