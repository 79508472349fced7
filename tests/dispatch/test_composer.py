"""Messages that are made ahead are those that `compose` makes, each given out once, and nothing is given out after the end."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mail_pipelines.dispatch import composer
from mail_pipelines.dispatch.composer import Composer
from mail_pipelines.messages.composing import ComposeError, Draft, Message, Recipient, compose, draft
from tests.messages.test_composing import END, message_of
from tests.messages.test_dkim import SIGNING

COMPILED = message_of("Hello", "Hello {{ first_name }}\n", f"<p>Hello {{{{ first_name }}}} {END}</p>\n")
# The third address cannot be used.
ROWS = [Recipient(1, number, 0, f"reader{number}@example.test" if number != 3 else "nobody", {"first_name": f"R{number}"}) for number in range(1, 101)]
UNUSABLE = ROWS[2]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with composer.threads() as threads:
        yield threads


def drafted(row: Recipient) -> Draft:
    return draft(COMPILED, row, SIGNING())


def composing(
    rows: list[Recipient],
    pool: ThreadPoolExecutor,
    *,
    by: Callable[[Recipient], Draft] = drafted,
    drop: Callable[[Recipient], None] = pytest.fail,
) -> Composer[Recipient]:
    left = iter(rows)
    return Composer(lambda: next(left, None), by, pool, drop)


class Held:
    """Drafts whose signatures are held until `go` is set; `begun` is set when the first is asked for."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, row: Recipient) -> Draft:
        held = self

        class Slow(Draft):
            def sign(self) -> bytes:
                held.begun.set()
                assert held.go.wait(60)
                return super().sign()

        made = drafted(row)
        return Slow(**{field.name: getattr(made, field.name) for field in dataclasses.fields(made)})


def test_each_row_is_given_out_once_in_order_with_the_message_that_compose_makes(pool: ThreadPoolExecutor) -> None:
    made = composing(ROWS, pool)

    async def everything() -> list[tuple[Recipient, Message | ComposeError]]:
        given = []
        while (one := await made.next()) is not None:
            given.append(one)
        assert not made.busy
        return given

    given = asyncio.run(everything())
    messages = [(row, message) for row, message in given if isinstance(message, Message)]
    assert messages == [(row, compose(COMPILED, row, SIGNING())) for row in ROWS if row is not UNUSABLE]
    [(refused, why)] = [one for one in given if one not in messages]
    assert refused is UNUSABLE
    assert isinstance(why, ComposeError)


def test_connections_that_ask_at_once_get_every_row_once(pool: ThreadPoolExecutor) -> None:
    made = composing(ROWS, pool)

    async def one() -> list[Recipient]:
        given = []
        while (next_one := await made.next()) is not None:
            given.append(next_one[0])
        return given

    async def connections() -> list[list[Recipient]]:
        return await asyncio.gather(*(one() for _ in range(16)))

    given = asyncio.run(connections())
    assert sorted(row.contact_id for rows in given for row in rows) == [row.contact_id for row in ROWS]
    # Also those that find no row left wait for what is being signed.
    assert sum(bool(rows) for rows in given) > len(ROWS) // 8


def test_the_loop_goes_on_while_signatures_are_computed(pool: ThreadPoolExecutor) -> None:
    held = Held()
    made = composing(ROWS[:2], pool, by=held)

    async def others() -> None:
        asked = asyncio.create_task(made.next())
        assert await asyncio.to_thread(held.begun.wait, 60)
        # Nothing is left of the rows, but what is being signed is still to come.
        assert made.busy
        assert not asked.done()
        held.go.set()
        assert await asked is not None

    asyncio.run(others())


def test_what_is_signed_after_the_end_is_given_to_nobody(pool: ThreadPoolExecutor) -> None:
    held = Held()
    dropped: list[Recipient] = []
    made = composing(ROWS, pool, by=held, drop=dropped.append)

    async def ended() -> object:
        asked = asyncio.create_task(made.next())
        assert await asyncio.to_thread(held.begun.wait, 60)
        made.end()
        assert not made.busy
        held.go.set()
        return await asked

    assert asyncio.run(ended()) is None
    # Whoever counts rows that wait hears of those that were begun.
    assert sorted(row.contact_id for row in dropped) == list(range(1, 9))


def test_rows_that_come_later_are_made_when_they_are_here(pool: ThreadPoolExecutor) -> None:
    rows: list[Recipient] = []
    made = Composer(lambda: rows.pop() if rows else None, drafted, pool, pytest.fail)

    async def twice() -> None:
        assert await made.next() is None
        rows.append(ROWS[0])
        given = await made.next()
        assert given is not None
        assert given[0] is ROWS[0]

    asyncio.run(twice())
