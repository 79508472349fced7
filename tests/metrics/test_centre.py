"""What the centre tells when there is little to tell."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from mail_pipelines.config import MetricsSettings
from mail_pipelines.database.engine import create_engine
from mail_pipelines.metrics.centre import CentreMetrics
from mail_pipelines.metrics.endpoint import MetricsError, telling
from mail_pipelines.metrics.outcomes import Minutes, Outcomes
from tests.parts.processes import free_port

GOOGLE = (1, "google", 10)


def away() -> sa.Engine:
    return create_engine(f"mysql://mail@127.0.0.1:{free_port()}/mail")


def test_a_database_that_is_away_is_told_and_nothing_else() -> None:
    told = CentreMetrics(away()).collect()
    assert [(metric.name, [sample.value for sample in metric.samples]) for metric in told] == [("mail_pipelines_database_reachable", [0])]


def test_an_installation_without_campaigns_or_servers_tells_so(engine: sa.Engine) -> None:
    told = {sample.name: sample.value for metric in CentreMetrics(engine).collect() for sample in metric.samples}
    assert told["mail_pipelines_database_reachable"] == 1
    assert told["mail_pipelines_recovery_open"] == 0


def test_outcomes_only_rise_and_none_is_counted_twice() -> None:
    outcomes = Outcomes()
    looks: list[tuple[Minutes, int]] = [
        # What was there before this process.
        ({(1, GOOGLE): 50}, 0),
        ({(1, GOOGLE): 50}, 0),
        ({(1, GOOGLE): 52, (2, GOOGLE): 3}, 5),
        # A correction takes one away, and the minute before is forgotten.
        ({(2, GOOGLE): 2}, 5),
        ({(2, GOOGLE): 4, (3, GOOGLE): 1}, 8),
        ({}, 8),
    ]
    for minutes, total in looks:
        outcomes.advance(minutes)
        assert outcomes.totals[GOOGLE] == total


@pytest.mark.parametrize(("port", "words"), [(0, "metrics.port is 0"), (1, "metrics.listen and metrics.port")])
def test_a_port_that_cannot_be_had_is_named(port: int, words: str) -> None:
    settings = MetricsSettings(listen="127.0.0.1" if port == 0 else "192.0.2.1", port=port)
    with pytest.raises(MetricsError, match=words), telling(CentreMetrics(away()), settings):
        pass
