"""Promise 1 against what only a whole host can show, in a short seeded run: the database, the log disk and the power are taken away."""

from __future__ import annotations

import pytest

from mail_pipelines.benchmarks import crash
from mail_pipelines.errors import MailPipelinesError

# The others are attacked, with tighter bounds for each, in tests/dispatch and tests/e2e.
KINDS = ["MariaDB", "log disk full", "power loss"]


@pytest.mark.server
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_nobody_is_lost_or_mailed_twice(kind: str) -> None:
    verdicts: list[crash.Verdict] = []
    results = crash.run(quick=True, seed=7, only=[kind], report=verdicts.append)
    (verdict,) = verdicts
    count = verdict.count
    assert verdict.kills == verdict.kills_asked == 2
    assert (count.duplicates, count.lost) == (0, 0)
    assert count.arrived + count.unknown >= count.recipients
    assert count.unknown <= verdict.bound + count.unanswered
    assert [result.name for result in results if not result.met] == []


def test_a_kind_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(MailPipelinesError, match="no kind of kill is named 'fire'; expected send run, "):
        crash.run(quick=True, only=["fire"])
