"""Dagster's daemon or web server over a storage that keeps its connections: `python -m mail_pipelines.dagster_process daemon …`, with Dagster's own options.

They tell the code server, and the runs that it begins, which storage to use. Whatever else uses the home (the command `dagster`, `doctor`, workers) has
Dagster's own, which sees the same files or tables.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mail_pipelines.imports import uncollected

if TYPE_CHECKING:
    from dagster._core.instance.ref import InstanceRef

_COMMANDS = {"daemon": ("dagster._daemon.cli", ["dagster-daemon", "run"]), "web": ("dagster_webserver.cli", ["dagster-webserver"])}
_KEPT = {
    "DagsterSqliteStorage": ("mail_pipelines.resources.kept_sqlite", "KeptSqliteStorage"),
    "DagsterMySQLStorage": ("mail_pipelines.resources.kept_mysql", "KeptMySQLStorage"),
}


def kept(dagster_home: str) -> InstanceRef:
    """The instance that a home's `dagster.yaml` describes, with our form of its storage; another storage than Dagster's two is left as it is."""
    from dagster._core.instance.ref import InstanceRef
    from dagster._serdes import ConfigurableClassData

    reference = InstanceRef.from_dir(dagster_home)
    storage = reference.storage_data
    if storage is None or storage.class_name not in _KEPT:
        return reference
    return reference._replace(storage_data=ConfigurableClassData(*_KEPT[storage.class_name], storage.config_yaml))


def main(what: str, arguments: Sequence[str]) -> None:
    """Run until SIGTERM the daemon or web server of the home in DAGSTER_HOME; without it, Dagster itself says what it needs."""
    module, command = _COMMANDS[what]
    with uncollected():
        cli = importlib.import_module(module)
    from dagster._serdes import serialize_value

    of_home = ["--instance-ref", serialize_value(kept(os.environ["DAGSTER_HOME"]))] if "DAGSTER_HOME" in os.environ else []
    # Only here, and not in the command line that every program of the host may read: a storage's address may have a password.
    sys.argv = [*command, *of_home, *arguments]
    cli.main()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
