"""Postfix's load generator and sink, the references for SMTP: unpacked from its Debian package by `script/setup test`, not installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mail_pipelines.config import project_folder
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.free_ports import free_port

_START_SECONDS = 60


def find_binary(name: str) -> tuple[str, dict[str, str]]:
    """The path of `smtp-sink` or `smtp-source`, and the environment it needs; raises `MailPipelinesError` if there is none."""
    project = project_folder()
    if project is not None and (unpacked := project / ".postfix" / "usr" / "sbin" / name).exists():
        return str(unpacked), {"LD_LIBRARY_PATH": str(project / ".postfix" / "usr" / "lib" / "postfix")}
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        raise MailPipelinesError(f"{name} of Postfix was not found: run `script/setup test`, which unpacks it")
    return path, {}


@contextmanager
def sink() -> Iterator[tuple[int, int]]:
    """A running `smtp-sink` that takes everything: (port on 127.0.0.1, process id)."""
    program, environment = find_binary("smtp-sink")
    port = free_port()
    # Started by root it insists on another user, and that user on a place to be.
    as_user = ["-u", "nobody"] if os.geteuid() == 0 else []
    process = subprocess.Popen([program, *as_user, f"127.0.0.1:{port}", "4096"], env=environment, cwd="/", stdout=subprocess.DEVNULL)
    try:
        wait_for_port(port, process)
        yield port, process.pid
    finally:
        process.kill()
        process.wait()


def source(port: int, data: bytes, messages: int, connections: int) -> float:
    """Seconds that `smtp-source` takes to send so many copies of a message, several on a connection."""
    program, environment = find_binary("smtp-source")
    with tempfile.NamedTemporaryFile(prefix="mail-pipelines-") as file:
        file.write(data)
        file.flush()
        Path(file.name).chmod(0o644)
        begin = time.perf_counter()
        # -d: connections are kept open.
        subprocess.run([program, "-d", "-F", file.name, "-m", str(messages), "-s", str(connections), f"127.0.0.1:{port}"], env=environment, check=True)
        return time.perf_counter() - begin


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_SECONDS
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None or time.monotonic() > end:
            raise MailPipelinesError(f"{process.args!r} does not listen on port {port}")
        time.sleep(0.02)
