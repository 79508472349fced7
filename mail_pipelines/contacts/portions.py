"""The rows of an import in portions of one transaction each: large ones, but small ones with rests between them while mail is sent.

An import can keep every processor of the database busy, and what it writes makes the next commit of everybody longer. What belongs here:
how much at once, when to rest, and what is made ready ahead. What does not: what is done with a portion (`merging`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Claim
from mail_pipelines.database.types import utc_now

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
# Beside sending. They take about a twentieth of a second; with fewer, the statements would cost more than the rows. Not by time: where many
# processes wait for a processor each statement takes long, and the smaller the portions, the more statements.
PORTION_ROWS = 2_000
# A portion that took longer has waited for a lock, which says nothing about how busy the database is.
MOST_REST_SECONDS = 1.0
# A claim is open until its last answer is recorded, so while a server sends there nearly always is one.
_SENDING = sa.select(sa.exists().where(Claim.state == "open", Claim.lease_until > utc_now()))


def portions(
    engine: Engine, batch: pa.Table, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> Iterator[pa.Table]:
    """All rows in order. What the caller does until it asks for the next portion is the work, and the rest is as long as that took.

    So an import beside sending keeps half of its speed, and where the database is busy it is as slow as everybody, and rests as long.
    """
    start = 0
    while start < batch.num_rows:
        sending = is_sending(engine)
        portion = batch.slice(start, PORTION_ROWS if sending else batch.num_rows)
        start += portion.num_rows
        begin = clock()
        yield portion
        if sending:
            sleep(min(clock() - begin, MOST_REST_SECONDS))


def ahead(engine: Engine, items: Iterator[T]) -> Generator[T]:
    """The items; the next is made ready while the database works on this one. Beside sending that is done afterwards, which leaves a processor free."""
    nothing = object()
    with ThreadPoolExecutor(1) as maker:
        pending = maker.submit(next, items, nothing)
        while (item := pending.result()) is not nothing:
            at_once = not is_sending(engine)
            if at_once:
                pending = maker.submit(next, items, nothing)
            yield item  # type: ignore[misc]
            if not at_once:
                pending = maker.submit(next, items, nothing)


def is_sending(engine: Engine) -> bool:
    """Whether rows are with a server that may still send them."""
    with reading(engine) as connection:
        return bool(connection.execute(_SENDING).scalar_one())
