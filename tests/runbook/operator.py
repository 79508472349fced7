"""An operator with the runbook open at one chapter, who types what it says at an installation."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

from typer.testing import CliRunner

from mail_pipelines.cli import app
from mail_pipelines.commands import context
from tests.runbook.document import COMMANDS, PRINTED, ROOT, Block, filled, is_printed

# What a unit's start and stop do in a world.
Units = Mapping[str, tuple[Callable[[], object], Callable[[], object]]]
UNITS = ROOT / "infra/systemd"
_FINDS = {("doctor",), ("server", "verify")}
# For whoever looks at servers, that they speak: one that a busy machine has kept waiting for some seconds is not what is wrong in a chapter.
_PATIENT = {"MAIL_PIPELINES_SERVER__HEARTBEAT_SECONDS": "60"}


class Operator:
    """Takes the blocks of a chapter in their order. `names`: what its words in capitals stand for."""

    def __init__(self, blocks: list[Block], names: dict[str, str], units: Units | None = None) -> None:
        self._blocks, self._names, self._units = list(blocks), names, units or {}
        # What was printed since the last block of commands began.
        self.output = ""

    def types(self) -> str:
        """Type the next block, which has to be one of commands; returns what was printed."""
        self.output = ""
        for line in self._next(COMMANDS):
            self.output += self._type(filled(line, self._names))
        return self.output

    def types_and_waits(self) -> subprocess.Popen[str]:
        """Type the next block, one command that goes on while others are typed elsewhere."""
        (line,) = self._next(COMMANDS)
        words = shlex.split(filled(line, self._names))
        assert words.pop(0) == "mail-pipelines"
        # What is printed is to be seen at once.
        command = [sys.executable, "-u", "-m", "mail_pipelines", *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def sees(self, output: str | None = None) -> None:
        """The next block is of what is printed, and all of it was: by the commands before, or in `output`."""
        said = self.output if output is None else output
        lines = [filled(line, self._names) for line in self._next(PRINTED)]
        assert [line for line in lines if not is_printed(line, said)] == [], said

    def closes(self) -> None:
        """Nothing of the chapter is left."""
        assert self._blocks == []

    def _next(self, kind: str) -> tuple[str, ...]:
        block = self._blocks.pop(0)
        assert block.kind == kind, block
        return block.lines

    def _type(self, line: str) -> str:
        assert not re.search(r"\b[A-Z]{4,}\b", line), f"{line}: what does the word in capitals stand for?"
        words = shlex.split(line)
        if words[0] == "mail-pipelines":
            return self._command(words[1:])
        if words[0] == "systemctl":
            return self._systemctl(*words[1:])
        done = subprocess.run(["sh", "-euc", line], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _command(self, words: list[str]) -> str:
        """In this process: starting Python for each takes a second."""
        context.settings.cache_clear()
        with mock.patch.object(context.console, "_width", 400), mock.patch.dict(os.environ, _PATIENT):
            done = CliRunner().invoke(app, words)
        finds = any(tuple(words[: len(known)]) == known for known in _FINDS)
        assert done.exit_code == 0 or (finds and done.exit_code == 1), f"{words}: {done.output}{done.exception!r}"
        return done.output

    def _systemctl(self, verb: str, *units: str) -> str:
        """As systemd: units by their names or, to stop, by a pattern. What has no process in this world is another host's."""
        known = {path.stem for path in UNITS.glob("*.service")}
        for unit in units:
            named = fnmatch.filter(known, unit) if verb == "stop" else [unit]
            assert named, f"there is no unit {unit}"
            assert known.issuperset(named)
            for name in sorted(named):
                start, stop = self._units.get(name, (lambda: None, lambda: None))
                if verb in ("stop", "restart"):
                    stop()
                if verb in ("start", "restart"):
                    start()
        return ""


def started(unit: str) -> subprocess.Popen[bytes]:
    """What a unit's file starts, from this checkout and with this environment."""
    text = (UNITS / f"{unit}.service").read_text(encoding="utf-8")
    command = re.search(r"^ExecStart=/opt/mail-pipelines/\.venv/bin/(.+)$", text, re.MULTILINE)
    assert command is not None
    program, *words = shlex.split(command[1])
    path = Path(sys.executable).parent / program
    return subprocess.Popen([path, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
