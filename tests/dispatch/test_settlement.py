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
ROW = Offered(7, 0)
TOKEN = token_of(CLAIM, ROW, KEY)
OK, LATER, NEVER = Outcome(Kind.DELIVERED, 250), Outcome(Kind.DEFERRED, 421, text="Unexpected log failure, please try later"), Outcome(Kind.BOUNCED, 550)


@pytest.mark.parametrize(
    ("evidence", "reply", "same_life", "state"),
    [
        (Evidence(covered=True, outcomes={TOKEN: OK}), None, True, State.DELIVERED),
        (Evidence(covered=True, outcomes={TOKEN: NEVER}), OK, True, State.BOUNCED),
        (Evidence(covered=False, outcomes={TOKEN: LATER}), None, False, State.DEFERRED),
        (Evidence(covered=True, outcomes={TOKEN: Outcome(Kind.VOID, 451)}), None, True, State.PENDING),
        (Evidence(covered=True, intents={TOKEN: 99}), None, True, State.UNKNOWN),
        (Evidence(covered=True), None, True, State.PENDING),
        (Evidence(covered=True), None, False, State.UNKNOWN),
        (Evidence(covered=False), None, True, State.UNKNOWN),
        # The line is lost, and the server says what the destination said; or only that it cannot write the line.
        (Evidence(covered=True, intents={TOKEN: 99}), OK, True, State.DELIVERED),
        (Evidence(covered=True, intents={TOKEN: 99}), LATER, True, State.UNKNOWN),
        (Evidence(covered=True, intents={TOKEN: 99}), NEVER, True, State.UNKNOWN),
        (Evidence(covered=True), LATER, True, State.PENDING),
    ],
)
def test_the_end_of_a_row(evidence: Evidence, reply: Outcome | None, same_life: bool, state: State) -> None:
    row = Offered(ROW.contact_id, ROW.attempt, reply)
    (result,) = conclude([row], evidence, CLAIM, SendingSettings(), KEY, 0, same_life=same_life)
    assert result.state is state
