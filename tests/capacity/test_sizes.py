"""How large campaigns are expected to be that have no audience yet, and that plans know it before anything is sent."""

from __future__ import annotations

import datetime as dt

import pytest
import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.capacity import planning, sizes
from mail_pipelines.config import Settings
from mail_pipelines.database import models
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import State, SyncState
from tests.campaigns.parts import NOW, add_contacts, fill_ledger, make_campaign, make_people, refresh_snapshots, save_segment

DAY = dt.timedelta(days=1)
pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def settings(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of an installation with a hundred contacts, a fifth at each of five providers, of whom the segment `late` has the last twenty."""
    monkeypatch.setenv("MAIL_PIPELINES_SENDING__TOKEN_KEY", "a key for tests only, long enough")
    settings = config.load()
    make_people(engine, settings, 100)
    save_segment(engine, "late", {"field": "number", "op": ">", "value": 80})
    return settings


def expected(engine: sa.Engine, *campaigns: int) -> dict[int, int]:
    with reading(engine) as connection:
        return {number: sum(found.values()) for number, found in sizes.expected(connection, campaigns).items()}


def test_whom_the_segments_match_is_counted_for_those_that_are_like_none_before(engine: sa.Engine, settings: Settings) -> None:
    first = make_campaign(engine, "first", state="scheduled", start_at=NOW + 50 * DAY, exclude=("late",))
    far_off = make_campaign(engine, "far off", state="scheduled", start_at=NOW + 57 * DAY)
    draft = make_campaign(engine, "draft", start_at=NOW + DAY)
    ids = (first.id, far_off.id, draft.id)
    assert expected(engine, *ids) == {}
    assert sizes.count(engine, settings, NOW) == []
    assert expected(engine, *ids) == {first.id: 80}
    with reading(engine) as connection:
        assert sizes.expected(connection, [first.id])[first.id]["google"] == 16
    # Another day, other contacts; not at each plan.
    add_contacts(engine, 101, 200)
    refresh_snapshots(engine, settings)
    save_segment(engine, "late", {"field": "number", "op": ">", "value": 150})
    sizes.count(engine, settings, NOW + 0.9 * DAY)
    assert expected(engine, first.id) == {first.id: 80}
    sizes.count(engine, settings, NOW + DAY)
    assert expected(engine, first.id) == {first.id: 150}
    # One that was sent to the same segments says more: it counted those who may be mailed.
    before = make_campaign(engine, "before", state="finished", exclude=("late",))
    fill_ledger(engine, before.id, {State.DELIVERED: 7, State.SUPPRESSED: 3})
    assert expected(engine, first.id) == {first.id: 7}


def test_a_count_is_of_the_segments_that_were_counted_and_goes_when_the_campaign_has_begun(engine: sa.Engine, settings: Settings) -> None:
    campaign = make_campaign(engine, "first", state="scheduled", start_at=NOW + DAY)
    sizes.count(engine, settings, NOW)
    assert expected(engine, campaign.id) == {campaign.id: 100}

    def change(**values: object) -> None:
        transact(engine, lambda connection: connection.execute(sa.update(models.Campaign).where(models.Campaign.id == campaign.id).values(**values)))

    change(segments={"include": ["late"], "exclude": []})
    assert expected(engine, campaign.id) == {}
    sizes.count(engine, settings, NOW)
    assert expected(engine, campaign.id) == {campaign.id: 20}
    change(state="sending")
    sizes.count(engine, settings, NOW)
    with reading(engine) as connection:
        assert connection.execute(sa.select(SyncState.key).where(SyncState.source == "campaign_sizes")).all() == []


def test_what_cannot_be_counted_is_told_and_the_others_are(engine: sa.Engine, settings: Settings) -> None:
    lost = make_campaign(engine, "lost", state="scheduled", start_at=NOW + DAY, include=("gone",))
    good = make_campaign(engine, "good", state="scheduled", start_at=NOW + DAY)
    (problem,) = sizes.count(engine, settings, NOW)
    assert "gone" in problem
    assert expected(engine, lost.id, good.id) == {good.id: 100}


def test_plans_of_two_days_and_of_weeks_know_a_campaign_that_is_the_first_of_its_kind(engine: sa.Engine, settings: Settings) -> None:
    make_campaign(engine, "tomorrow", state="scheduled", start_at=NOW + DAY)
    make_campaign(engine, "next month", state="scheduled", start_at=NOW + 30 * DAY)
    sizes.count(engine, settings, NOW)
    with reading(engine) as connection:
        situation = planning.read(connection, settings, NOW)
    assert {job.key: job.sized for job in situation.jobs}["tomorrow"]
    assert sum(demand.rows for demand in situation.demands if demand.job.key == "tomorrow") == 100
    (outlook,) = situation.outlooks
    assert sum(days[30] for days in outlook.demand.values()) == 100
