"""The parts of a source in their turn: what is read of it, and then what it is told, whether or not it could be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.sources.declaration import Part
from mail_pipelines.sources.errors import SourceError

T = TypeVar("T")


def in_turn(parts: Iterable[Part], run: Callable[[Part], T]) -> Iterator[tuple[Part, T | Exception]]:
    """Run each part, and give what it returned, or by what it failed.

    Without the suppressions no contacts are read: somebody who left there would be subscribed for a moment.
    """
    failed: set[Part] = set()
    for part in parts:
        if part == "contacts" and "suppressions" in failed:
            continue
        outcome: T | Exception
        try:
            outcome = run(part)
        except Exception as error:  # noqa: BLE001 (it is given to who asked)
            failed.add(part)
            outcome = error
        yield part, outcome


def together(errors: Sequence[Exception]) -> Exception:
    """One error for all parts that failed: what is no word of ours, which has to be looked into, or else their words."""
    words = dict.fromkeys(str(error) for error in errors)
    strange = [error for error in errors if not isinstance(error, MailPipelinesError)]
    return strange[0] if strange else errors[0] if len(words) == 1 else SourceError("; ".join(words))
