"""Doing several pieces of database work at once, so that server and client, or two cores of the server, are busy together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from sqlalchemy.engine import Engine

from mail_pipelines.database.engine import is_mysql

T = TypeVar("T")
R = TypeVar("R")


def overlapped(engine: Engine, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`work` on each item, results in the order of the items. `work` opens its own connections.

    Two at once on a server, one on SQLite, which has one writer. Items are taken as they are needed, so a long input is never held
    at once; after an error, or when the caller stops, nothing further begins and what has begun is waited for.
    """
    threads = 2 if is_mysql(engine) else 1
    pool = ThreadPoolExecutor(threads)
    begun: deque[Future[R]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
