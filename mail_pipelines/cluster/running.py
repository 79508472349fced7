"""A whole cluster: its folders, and everything in them but Dagster, started and stopped."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from mail_pipelines.cluster import backing, hosts
from mail_pipelines.cluster.hosts import Centre, Server
from mail_pipelines.supervision import Processes, Stopped

_TMPFS = Path("/dev/shm")


@contextmanager
def alone() -> Iterator[None]:
    """In the block, the environment is without an installation of the reader's."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(hosts.neutral(before))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def folders(console: Console) -> Iterator[tuple[Path, Path]]:
    """A folder on disk, and one on tmpfs for what is in /run on a real host. They are removed, but after an error: then their logs tell more."""
    made = [Path(tempfile.mkdtemp(prefix="mail-pipelines-cluster-", dir=place)) for place in (None, _TMPFS if _TMPFS.is_dir() else None)]
    for folder in made:
        # Exim's own user has to pass; what is in there is closed to others.
        folder.chmod(0o711)
    failed = True
    try:
        yield made[0], made[1]
        failed = False
    except Stopped:
        failed = False
        raise
    finally:
        if failed:
            console.print(f"kept, for you to look into and to remove: {made[0]} {made[1]}", style="yellow", markup=False)
        else:
            for folder in made:
                shutil.rmtree(folder)


def start(folder: Path, run_folder: Path, names: Sequence[str], processes: Processes, stack: ExitStack, console: Console) -> tuple[Centre, list[Server]]:
    """Database, broker, the homes and processes of the centre and of servers with these names."""
    with console.status("starting MariaDB and RabbitMQ"):
        given = backing.start(folder, names, stack)
    # Before those two, and all at once.
    stack.callback(processes.stop_all)
    stack.callback(processes.terminate)
    processes.check()
    with console.status("making the homes of the centre and of the servers"):
        centre = Centre.make(folder / "centre", given.centre, processes)
        stack.callback(centre.engine.dispose)
        fleet = [Server.make(name, folder / name, run_folder / name, given.of_server[name], centre) for name in names]
    centre.start_worker()
    for server in fleet:
        server.start(processes)
    return centre, fleet
