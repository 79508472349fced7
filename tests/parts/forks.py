"""Processes that tests start by the hundred, as forks of one that has imported what they need (`warm`): to import it takes longer than most of them work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.parts.warm"])


def as_started() -> None:
    """Heed signals as a program does that a shell has started: what is ignored where the tests run (SIGINT is by xdist, and Dagster gives SIGTERM the same)
    would be ignored here."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _main(words: tuple[str, ...], environ: Mapping[str, str], output: Path) -> None:
    from mail_pipelines import cli

    with output.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    as_started()
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = ["mail-pipelines", *words]
    cli.main()


class Command:
    """`mail-pipelines WORDS…` with an environment, its output appended to a file; what of `subprocess.Popen` the tests of servers use."""

    def __init__(self, *words: str, environ: Mapping[str, str], output: Path) -> None:
        self._words = words
        self._process = processes.Process(target=_main, args=(words, dict(environ), output), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (status := self.poll()) is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self._words, timeout)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
