"""What cannot work is found before it is scheduled, all at once, with line and variable; and what is found cannot be scheduled."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

import pytest
import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.campaigns import audience, scheduling, versions
from mail_pipelines.campaigns.campaign import CampaignError
from mail_pipelines.campaigns.check import CheckFailed, Problem, check
from mail_pipelines.campaigns.states import CampaignState, StateError
from mail_pipelines.config import Settings
from mail_pipelines.contacts import consent
from mail_pipelines.database import models
from mail_pipelines.database.engine import transact
from mail_pipelines.messages.content import Content
from tests.campaigns.parts import NOW, load, make_campaign, make_people, refresh_snapshots, save_segment

BODY = '<p>Hello</p>\n<p>{{ number }}</p>\n<p><a href="{{ unsubscribe_url }}">Leave</a></p>'
CONTENT = Content(subject="Hello", from_address="news@shop.example", body=BODY)
HOUR = dt.timedelta(hours=1)


@pytest.fixture
def people(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 10)


@pytest.mark.usefixtures("people")
def test_a_sound_campaign_has_no_problems_and_can_be_scheduled(engine: sa.Engine, settings: Settings) -> None:
    make_campaign(engine, start_at=NOW + HOUR)
    version = versions.set_content(engine, "spring-sale", CONTENT, NOW)
    assert check(engine, settings, "spring-sale", NOW) == []
    campaign = scheduling.schedule(engine, settings, "spring-sale", NOW)
    assert (campaign.state, campaign.version_id, campaign.definition.start_at) == (CampaignState.SCHEDULED, version.id, NOW + HOUR)
    assert audience.build(engine, settings, "spring-sale", NOW + HOUR).audience == 10


@pytest.mark.usefixtures("people")
def test_everything_that_cannot_work_is_named_at_once(engine: sa.Engine, settings: Settings) -> None:
    save_segment(engine, "gone", {"field": "number", "op": "=", "value": 1})
    make_campaign(
        engine,
        include=("everybody", "everbody", "gone"),
        start_at=NOW - HOUR,
        finish_by=NOW - 2 * HOUR,
        expire_at=NOW - HOUR,
    )
    versions.set_content(engine, "spring-sale", replace(CONTENT, body=BODY.replace("number", "nubmer")), NOW)
    transact(engine, lambda connection: connection.execute(sa.update(models.Field).values(key="digit")))
    problems = {problem.part: problem for problem in check(engine, settings, "spring-sale", NOW)}
    assert set(problems) == {"start_at", "finish_by", "expire_at", "content.body", "segments.include[1]", "segments.include[2]"}
    assert "is in the past" in problems["start_at"].message
    assert "is not after the start" in problems["finish_by"].message
    assert (problems["content.body"].line, problems["content.body"].variable) == (2, "nubmer")
    assert str(problems["content.body"]).startswith("content.body, line 2: ")
    assert "no segment 'everbody'" in problems["segments.include[1]"].message
    assert "segment gone: field: unknown field 'number'" in problems["segments.include[2]"].message
    with pytest.raises(CheckFailed, match=r"cannot be scheduled:\n(.*\n)*  content.body, line 2") as caught:
        scheduling.schedule(engine, settings, "spring-sale", NOW)
    assert len(caught.value.problems) == 6
    assert load(engine).state is CampaignState.DRAFT


@pytest.mark.usefixtures("people")
def test_what_is_missing_is_named(engine: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    make_campaign(engine, include=())
    assert [problem.part for problem in check(engine, settings, "spring-sale", NOW)] == ["content", "segments.include"]
    monkeypatch.delenv("MAIL_PIPELINES_SENDING__TOKEN_KEY")
    monkeypatch.setenv("MAIL_PIPELINES_SENDING__PUBLIC_URL", "http://insecure.example")
    assert "sending.token_key is not set" in str(next(problem for problem in check(engine, config.load(), "spring-sale", NOW) if problem.part == "settings"))
    monkeypatch.setenv("MAIL_PIPELINES_SENDING__TOKEN_KEY", "a key for tests only, long enough")
    assert "http://insecure.example" in str(next(problem for problem in check(engine, config.load(), "spring-sale", NOW) if problem.part == "settings"))


@pytest.mark.usefixtures("people")
def test_an_audience_of_nobody_is_a_problem(engine: sa.Engine, settings: Settings) -> None:
    save_segment(engine, "nobody", {"field": "number", "op": ">", "value": 100})
    make_campaign(engine, include=("nobody",))
    versions.set_content(engine, "spring-sale", CONTENT, NOW)
    assert check(engine, settings, "spring-sale", NOW) == [Problem("segments", "nobody matches: the audience would be empty")]


def test_without_a_snapshot_the_check_says_how_to_get_one(engine: sa.Engine, settings: Settings) -> None:
    save_segment(engine, "everybody", {"all": []})
    make_campaign(engine)
    problem = check(engine, settings, "spring-sale", NOW)[-1]
    assert (problem.part, "segment refresh" in problem.message) == ("segments", True)


@pytest.mark.usefixtures("people")
def test_a_segment_over_a_field_newer_than_the_snapshot_asks_for_a_refresh(engine: sa.Engine, settings: Settings) -> None:
    city = {"key": "city", "label": "City", "type": "text", "created_at": NOW}
    transact(engine, lambda connection: connection.execute(sa.insert(models.Field).values(city)))
    save_segment(engine, "berlin", {"field": "city", "op": "=", "value": "Berlin"})
    make_campaign(engine, include=("berlin",))
    versions.set_content(engine, "spring-sale", CONTENT, NOW)
    (problem,) = check(engine, settings, "spring-sale", NOW)
    assert "segment berlin on the snapshot of 2026-03-02T09:00:00+00:00" in problem.message
    assert "segment refresh" in problem.message
    refresh_snapshots(engine, settings, NOW + HOUR)
    assert check(engine, settings, "spring-sale", NOW) == [Problem("segments", "nobody matches: the audience would be empty")]


@pytest.mark.usefixtures("people")
def test_a_start_is_given_by_the_campaign_by_hand_or_is_now(engine: sa.Engine, settings: Settings) -> None:
    for key in ("by-hand", "now", "forward"):
        make_campaign(engine, key)
        versions.set_content(engine, key, CONTENT, NOW)
    with pytest.raises(CampaignError, match="has no start: give --at TIME"):
        scheduling.schedule(engine, settings, "by-hand", NOW)
    assert scheduling.schedule(engine, settings, "by-hand", NOW, start_at=NOW + HOUR).definition.start_at == NOW + HOUR
    with pytest.raises(CheckFailed, match="is in the past"):
        scheduling.schedule(engine, settings, "forward", NOW, start_at=NOW - HOUR)
    assert scheduling.start(engine, settings, "now", NOW).definition.start_at == NOW
    scheduling.schedule(engine, settings, "forward", NOW, start_at=NOW + 5 * HOUR)
    forward = scheduling.start(engine, settings, "forward", NOW + HOUR)
    assert (forward.state, forward.definition.start_at) == (CampaignState.SCHEDULED, NOW + HOUR)


@pytest.mark.usefixtures("people")
def test_a_scheduled_campaign_is_taken_back_edited_and_scheduled_again(engine: sa.Engine, settings: Settings) -> None:
    make_campaign(engine, start_at=NOW + HOUR)
    versions.set_content(engine, "spring-sale", CONTENT, NOW)
    scheduling.schedule(engine, settings, "spring-sale", NOW)
    with pytest.raises(StateError, match="is scheduled, not draft"):
        scheduling.schedule(engine, settings, "spring-sale", NOW)
    scheduling.unschedule(engine, "spring-sale", NOW)
    second = versions.set_content(engine, "spring-sale", replace(CONTENT, subject="Better"), NOW)
    assert scheduling.schedule(engine, settings, "spring-sale", NOW).version_id == second.id


def test_pause_and_resume_are_refused_where_they_mean_nothing(engine: sa.Engine) -> None:
    make_campaign(engine, state="sending")
    assert scheduling.pause(engine, "spring-sale", NOW).state is CampaignState.PAUSED
    with pytest.raises(StateError, match="is paused, not sending"):
        scheduling.pause(engine, "spring-sale", NOW)
    assert scheduling.resume(engine, "spring-sale", NOW, "tester").state is CampaignState.SENDING
    with pytest.raises(StateError, match="is sending, not paused"):
        scheduling.resume(engine, "spring-sale", NOW, "tester")


def test_resume_releases_a_hold_in_any_state(engine: sa.Engine) -> None:
    for state in ("draft", "scheduled", "building", "sending", "paused"):
        make_campaign(engine, state, state=state, held="bounce rate 12 %")
        resumed = scheduling.resume(engine, state, NOW, "tester")
        assert (resumed.hold, resumed.state) == (None, "sending" if state == "paused" else state)


@pytest.mark.usefixtures("people")
def test_consent_withdrawn_after_the_check_is_respected_by_the_freeze(engine: sa.Engine, settings: Settings) -> None:
    make_campaign(engine)
    versions.set_content(engine, "spring-sale", CONTENT, NOW)
    scheduling.start(engine, settings, "spring-sale", NOW)
    transact(engine, lambda connection: consent.unsubscribe(connection, [4], scope="brand", scope_id=1, now=NOW))
    built = audience.build(engine, settings, "spring-sale", NOW)
    assert (built.audience, built.excluded) == (9, {"unsubscribe": 1})
