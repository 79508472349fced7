"""A process that freezes a campaign again and again, each time in a child that kills itself at the statement or commit it is told.

    python -m tests.campaigns.freezes DATABASE_URL KEY

Reads a number from standard input for each freeze: at that statement or commit the child gets SIGKILL. Answers `killed` or `ended`.
"""

from __future__ import annotations

import os
import signal
import sys

# Imported here, so that the children need not; threads start only when they are used.
import duckdb  # noqa: F401
import pyarrow.parquet  # noqa: F401

from mail_pipelines import config
from mail_pipelines.campaigns import audience, manifest
from mail_pipelines.database.engine import create_engine
from tests.campaigns.parts import NOW
from tests.parts.kills import die_at


def freeze(url: str, key: str, kill_at: int) -> None:
    engine = create_engine(url)
    die_at(kill_at, engine)
    manifest.CHUNK_ROWS = 10
    audience.build(engine, config.load(), key, NOW)


def main() -> None:
    url, key = sys.argv[1:]
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            freeze(url, key, int(line))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        answer = "killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else "ended" if status == 0 else f"failed: {status}"
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
