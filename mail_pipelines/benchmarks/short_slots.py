"""A benchmark in whose processes, and in whose database, slots are shorter than a quarter of an hour: so a campaign of many slots takes minutes.

The length of a slot is no setting: whoever counts in slots has to agree on it, every process and the procedures of the ledger, or limits would not hold. So it
is changed here alone, as a process begins and before those are loaded that count in slots, and in a database that is the benchmark's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

from sqlalchemy.engine import Connection, Engine

from mail_pipelines.benchmarks.contract import Result
from mail_pipelines.database.engine import transact
from mail_pipelines.database.procedures import installation
from mail_pipelines.delivery import recording
from mail_pipelines.errors import MailPipelinesError

_VARIABLE, _REAL = "BENCH_SLOT_SECONDS", 900
_IN_PROCEDURES = "DECLARE c_slot INT DEFAULT {};"

recording.SLOT_SECONDS = int(os.environ.get(_VARIABLE, _REAL))
recording.USAGE_WINDOWS = (recording.SLOT_SECONDS, *recording.USAGE_WINDOWS[1:])


def change(engine: Engine) -> None:
    """Have the procedures of a database count in slots of this process's length."""

    def work(connection: Connection) -> None:
        for name in installation.names():
            text = installation.text(name)
            changed = text.replace(_IN_PROCEDURES.format(_REAL), _IN_PROCEDURES.format(recording.SLOT_SECONDS))
            if changed != text:
                installation.put(connection, name, changed)

    transact(engine, work)


def run(slot_seconds: int, fleets: Sequence[int], seconds: float) -> list[Result]:
    """`fleet.measure` in a process with slots of this length. Raises `MailPipelinesError` if that fails."""
    words = [sys.executable, "-c", f"import sys; from {__package__} import short_slots; short_slots.main(sys.argv[1])", json.dumps([fleets, seconds])]
    done = subprocess.run(words, env={**os.environ, _VARIABLE: str(slot_seconds)}, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise MailPipelinesError(f"the benchmark ended with status {done.returncode}; what it said is above")
    return [Result(**values) for values in json.loads(done.stdout.splitlines()[-1])]


def main(words: str) -> None:
    # Loaded after the length of slots was changed.
    from mail_pipelines.benchmarks import fleet

    fleets, seconds = json.loads(words)
    sys.stdout.write(json.dumps([asdict(result) for result in fleet.measure(fleets, seconds)]) + "\n")
