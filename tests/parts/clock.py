"""A host whose clock is off, and may be set while its programs run: `python -m tests.parts.clock FILE WORDS…` is `mail-pipelines WORDS…` on a host
whose clock is as many seconds ahead of the true one as FILE says at the moment.

Python's code is told so by this module, and Exim by libfaketime. (Python does not bear that: `time.sleep` fails under it, and threads that wait spin.)
The monotonic clocks are true, as on such a host, and so is the time of SQLite and MariaDB. So are the dates of files, which would be off there as well.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mail_pipelines.dispatch.exim import instance

_KEPT_BY_EXIM = "\nkeep_environment =\n"


@dataclass(frozen=True)
class HostClock:
    """A clock that is as many seconds ahead as `file` says (negative: behind). Exim's user has to be able to read it."""

    file: Path

    @classmethod
    def of(cls, file: Path, ahead: float) -> HostClock:
        clock = cls(file)
        clock.set(ahead)
        return clock

    def set(self, ahead: float) -> None:
        """Whoever asks from now on is told so."""
        # Complete and readable before it has the name: whoever could not read it would take the clock for right.
        new = self.file.with_name(f"{self.file.name}.new")
        new.write_text(f"{ahead:+}", encoding="ascii")
        new.chmod(0o644)
        new.replace(self.file)

    @property
    def ahead(self) -> float:
        return float(self.file.read_text(encoding="ascii"))

    def goes_for_python(self) -> None:
        """Let the code of this process go by the clock."""
        true_time, true_time_ns, true_datetime = time.time, time.time_ns, datetime.datetime

        class Kind(type):
            def __instancecheck__(cls, value: object) -> bool:
                return isinstance(value, true_datetime)

        class Ahead(true_datetime, metaclass=Kind):
            """Makes true ones, which others know."""

            def __new__(cls, *values, **named):  # type: ignore[no-untyped-def]
                return true_datetime(*values, **named)

            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
                return true_datetime.fromtimestamp(time.time(), tz)

        time.time = lambda: true_time() + self.ahead
        time.time_ns = lambda: true_time_ns() + round(self.ahead * 1e9)
        datetime.datetime = Ahead  # type: ignore[misc]

    def goes_for_exim(self) -> None:
        """Let every process of an Exim that this process starts go by the clock."""
        library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
        assert library is not None, "run script/setup test, which installs faketime"
        environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
        # A program that takes on another user's rights when it starts loads nobody's library: Exim is copied without that.
        program = self.file.with_name("exim4")
        shutil.copyfile(instance.find_binary(), program)
        program.chmod(0o755)
        os.environ.update(environment | {"PATH": f"{program.parent}:{os.environ['PATH']}"})
        configure = instance.configure

        def configure_to_keep(exim: instance.Exim) -> str:
            text = configure(exim)
            assert text.count(_KEPT_BY_EXIM) == 1
            return text.replace(_KEPT_BY_EXIM, f"\nkeep_environment = {' : '.join(environment)}\n")

        instance.configure = configure_to_keep


def clean() -> None:
    """Remove what libfaketime shares between processes, of such as have ended: Exim's forget what to remove."""
    for path in Path("/dev/shm").glob("*faketime_*_*"):
        if not Path("/proc", path.name.rpartition("_")[2]).exists():
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


if __name__ == "__main__":
    # First what takes classes for keys when it is imported: SQLAlchemy knows the type of a value by its class.
    import sqlalchemy  # noqa: F401

    from mail_pipelines import cli

    given = HostClock(Path(sys.argv.pop(1)))
    given.goes_for_python()
    if sys.argv[1] == "exim":
        given.goes_for_exim()
    cli.main()
