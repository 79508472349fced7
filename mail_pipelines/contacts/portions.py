"""The rows of an import in portions of one transaction each: large ones, but small ones with rests between them while mail is sent.

An import can keep every processor of the database busy, and what it writes makes the next commit of everybody longer. What belongs here:
how much at once, and when to rest. What does not: what is done with a portion (`merging`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.database.bulk import CHUNK_ROWS
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Claim
from mail_pipelines.database.types import utc_now

if TYPE_CHECKING:
    import pyarrow as pa

# Beside sending a portion is as many rows as take about so long, within these bounds.
PORTION_SECONDS = 0.05
LEAST_ROWS, FIRST_ROWS, MOST_ROWS = 500, 2_000, CHUNK_ROWS
# A portion that waited for a lock says nothing about how busy the machine is.
MOST_REST_SECONDS = 1.0
# A claim is open until its last answer is recorded, so while a server sends there nearly always is one.
_SENDING = sa.select(sa.exists().where(Claim.state == "open", Claim.lease_until > utc_now()))


@dataclass
class Portions:
    """Of one import: `rows` is the size of its next portion beside sending."""

    engine: Engine
    rows: int = FIRST_ROWS
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def of(self, batch: pa.Table) -> Iterator[pa.Table]:
        """All rows in order. What the caller does until it asks for the next portion is the work that is measured.

        The rest is as long as that work took, so that an import beside sending keeps half of its speed on any machine.
        """
        start = 0
        while start < batch.num_rows:
            sending = self._is_sending()
            portion = batch.slice(start, self.rows if sending else batch.num_rows)
            start += portion.num_rows
            begin = self.clock()
            yield portion
            if sending:
                took = self.clock() - begin
                self.rows = max(LEAST_ROWS, min(MOST_ROWS, round(portion.num_rows * PORTION_SECONDS / took)))
                self.sleep(min(took, MOST_REST_SECONDS))

    def _is_sending(self) -> bool:
        """Whether rows are with a server that may still send them."""
        with reading(self.engine) as connection:
            return bool(connection.execute(_SENDING).scalar_one())
