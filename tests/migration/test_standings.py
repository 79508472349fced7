"""Nobody who left, there or here, is subscribed: what a subscription becomes, as a table."""

from __future__ import annotations

import datetime as dt

import pytest

from mail_pipelines.migration.source import State
from mail_pipelines.migration.standings import PLACES, Found, Place, decide

EARLY, MIDDLE, LATE = (dt.datetime(year, 1, 1, tzinfo=dt.UTC) for year in (2020, 2021, 2022))
IMPORTED, FORM, LEFT, WAITING = Place(True, "import"), Place(True, "form"), Place(False, "unsubscribe"), Place(False, "unconfirmed")


@pytest.mark.parametrize("state", PLACES)
@pytest.mark.parametrize("refused", [False, True])
def test_new_subscription_is_as_there_but_never_of_someone_who_left_here(state: State, refused: bool) -> None:
    decided = decide(Found(IMPORTED, MIDDLE, True, refused), state, EARLY)
    assert decided == (LEFT if refused and PLACES[state].subscribed else PLACES[state])


@pytest.mark.parametrize(
    ("found", "state", "since", "expected"),
    [
        (LEFT, "active", LATE, None),
        (Place(False, "disabled"), "active", LATE, None),
        (WAITING, "active", LATE, IMPORTED),
        (WAITING, "left", LATE, None),
        (IMPORTED, "left", EARLY, LEFT),
        (IMPORTED, "left", None, LEFT),
        (IMPORTED, "disabled", None, PLACES["disabled"]),
        (IMPORTED, "unconfirmed", LATE, None),
        (IMPORTED, "active", LATE, None),
        # Who came back here after leaving there stays; who left there after coming here has left.
        (FORM, "left", EARLY, None),
        (FORM, "left", None, None),
        (FORM, "left", LATE, LEFT),
    ],
)
def test_known_subscription_changes_only_so(found: Place, state: State, since: dt.datetime | None, expected: Place | None) -> None:
    assert decide(Found(found, MIDDLE, False, False), state, since) == expected


def test_confirmation_there_does_not_undo_a_refusal_here() -> None:
    assert decide(Found(WAITING, MIDDLE, False, True), "active", LATE) is None
