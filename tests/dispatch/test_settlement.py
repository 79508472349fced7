"""The table that turns a claim's journal into the end of each row."""

from __future__ import annotations

import datetime as dt

import pytest

from mail_pipelines.config import SendingSettings
from mail_pipelines.database.models import State
from mail_pipelines.delivery.recording import ClaimRef
from mail_pipelines.dispatch.journal import Evidence, Kind, Outcome
from mail_pipelines.dispatch.settlement import Offered, conclude, token_of

KEY = b"a key for tests"
CLAIM = ClaimRef(1, 1, 0, "google", 1, dt.datetime(2026, 1, 1, tzinfo=dt.UTC))
TOKEN = token_of(CLAIM, 7, 0, KEY)
OK, LATER, NEVER = Outcome(Kind.DELIVERED, 250), Outcome(Kind.DEFERRED, 421, text="Unexpected log failure, please try later"), Outcome(Kind.BOUNCED, 550)


@pytest.mark.parametrize(
    ("evidence", "answered", "same_life", "state"),
    [
        (Evidence(covered=True, outcomes={TOKEN: OK}), False, True, State.DELIVERED),
        (Evidence(covered=True, outcomes={TOKEN: NEVER}), True, True, State.BOUNCED),
        (Evidence(covered=False, outcomes={TOKEN: LATER}), False, False, State.DEFERRED),
        (Evidence(covered=True, outcomes={TOKEN: Outcome(Kind.VOID, 451)}), False, True, State.PENDING),
        (Evidence(covered=True, intents={TOKEN: 99}), False, True, State.UNKNOWN),
        (Evidence(covered=True), False, True, State.PENDING),
        (Evidence(covered=True), False, False, State.UNKNOWN),
        (Evidence(covered=False), False, True, State.UNKNOWN),
        # Whatever the server said: with a full log disk it says 421 for a message that was taken.
        (Evidence(covered=True, intents={TOKEN: 99}), True, True, State.UNKNOWN),
        (Evidence(covered=True), True, True, State.PENDING),
    ],
)
def test_the_end_of_a_row(evidence: Evidence, answered: bool, same_life: bool, state: State) -> None:
    (result,) = conclude([Offered(7, 0, TOKEN, answered)], evidence, CLAIM, SendingSettings(), 0, same_life=same_life)
    assert result.state is state
