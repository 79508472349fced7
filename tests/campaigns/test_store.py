"""The row is the truth, a draft can be edited, what is scheduled is frozen, and content versions never change."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

import pytest
import sqlalchemy as sa

from mail_pipelines.campaigns import store, versions
from mail_pipelines.campaigns.campaign import Campaign, CampaignError, Definition, Priority, Unsubscribe
from mail_pipelines.campaigns.states import CampaignState, StateError
from mail_pipelines.database import models
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.keys import InvalidKey
from mail_pipelines.messages.compiled import CompiledMessage
from mail_pipelines.messages.content import Content, ContentError
from tests.campaigns.parts import NOW, load, make_campaign

LATER = NOW + dt.timedelta(minutes=5)
BODY = '<p>Hello</p> <a href="https://shop.example/a">A</a> <a href="{{ unsubscribe_url }}">Leave</a>'
CONTENT = Content(subject="Hello", from_address="news@shop.example", body=BODY)


def add(engine: sa.Engine, *rows: models.Base) -> None:
    def work(connection: sa.Connection) -> None:
        for row in rows:
            values = {column.key: getattr(row, column.key) for column in sa.inspect(type(row)).columns if getattr(row, column.key) is not None}
            connection.execute(sa.insert(type(row)).values(values))

    transact(engine, work)


def create(engine: sa.Engine, definition: Definition) -> Campaign:
    return transact(engine, lambda connection: store.create(connection, definition, NOW))


def test_a_campaign_comes_back_as_it_was_written(engine: sa.Engine) -> None:
    add(engine, models.Brand(id=2, key="shop", name="Shop", created_at=NOW), models.Pool(id=2, key="warm"))
    add(engine, models.ContactList(id=5, key="news", name="News", brand_id=2, created_at=NOW))
    definition = Definition(
        name="Größer ✨",
        key="groesser",
        include=("a", "b"),
        exclude=("c",),
        brand="shop",
        pool="warm",
        unsubscribe=Unsubscribe.LIST,
        list="news",
        priority=Priority.URGENT,
        start_at=NOW,
        finish_by=LATER,
        expire_at=LATER,
    )
    campaign = create(engine, definition)
    assert campaign.definition == definition
    assert (campaign.state, campaign.brand_id, campaign.pool_id, campaign.list_id) == (CampaignState.DRAFT, 2, 2, 5)
    assert load(engine, "groesser") == campaign


def test_a_key_is_given_once(engine: sa.Engine) -> None:
    make_campaign(engine)
    with pytest.raises(CampaignError, match="there is a campaign spring-sale already"):
        make_campaign(engine)


def test_a_name_that_is_no_key_is_refused(engine: sa.Engine) -> None:
    with pytest.raises(InvalidKey, match=r"'Spring Sale' is no valid campaign key.*'spring-sale' would be one"):
        create(engine, Definition(name="Spring Sale", key="Spring Sale", include=("a",)))


def test_what_a_campaign_names_must_exist(engine: sa.Engine) -> None:
    base = Definition(name="x", key="x", include=("a",))
    for wrong, error in [
        (replace(base, brand="defualt"), "there is no brand 'defualt'; did you mean 'default'?"),
        (replace(base, pool="cold"), "there is no pool 'cold'"),
        (replace(base, overflow_pool="cold"), "there is no pool 'cold'"),
        (replace(base, unsubscribe=Unsubscribe.LIST, list="news"), "there is no list 'news'"),
    ]:
        with pytest.raises(CampaignError) as caught:
            create(engine, wrong)
        assert error in str(caught.value)


def test_a_list_without_unsubscribe_list_is_a_contradiction() -> None:
    with pytest.raises(CampaignError, match="exactly when unsubscribe is list"):
        Definition(name="x", key="x", include=("a",), list="news")


def test_an_unknown_campaign_is_answered_with_the_nearest(engine: sa.Engine) -> None:
    make_campaign(engine)
    with pytest.raises(CampaignError, match="no campaign 'spring-sael'; did you mean 'spring-sale'"):
        load(engine, "spring-sael")


def test_a_draft_can_be_edited_and_nothing_else(engine: sa.Engine) -> None:
    campaign = make_campaign(engine)
    edited = replace(campaign.definition, name="Summer sale", priority=Priority.LOW)
    assert transact(engine, lambda connection: store.update(connection, edited, LATER)).definition == edited
    for state in CampaignState:
        if state is not CampaignState.DRAFT:
            frozen = make_campaign(engine, state, state=state.value)
            again = replace(frozen.definition, priority=Priority.LOW)
            with pytest.raises(StateError, match=rf"{state} is {state}: priority can be changed in a draft only"):
                transact(engine, lambda connection, again=again: store.update(connection, again, LATER))
            unchanged = transact(engine, lambda connection, frozen=frozen: store.update(connection, frozen.definition, LATER))
            assert unchanged == frozen


def test_a_deadline_can_be_moved_until_the_campaign_is_over(engine: sa.Engine) -> None:
    for state in CampaignState:
        campaign = make_campaign(engine, f"deadline-{state}", state=state.value)

        def move(finish_by: dt.datetime | None, key: str = campaign.key) -> Campaign:
            return transact(engine, lambda connection: store.move_deadline(connection, key, finish_by, NOW))

        if state.is_terminal:
            with pytest.raises(StateError, match=f"is {state}: nothing is sent any more"):
                move(LATER)
            assert load(engine, campaign.key) == campaign
            continue
        assert move(LATER).definition == replace(campaign.definition, finish_by=LATER)
        with pytest.raises(CampaignError, match="is over already"):
            move(NOW)
        assert move(None).definition.finish_by is None


def test_content_becomes_a_compiled_version_with_its_links(engine: sa.Engine) -> None:
    make_campaign(engine)
    version = versions.set_content(engine, "spring-sale", CONTENT, NOW)
    assert version.number == 1
    compiled = CompiledMessage.from_bytes(version.compiled)
    assert compiled.sha256 == version.sha256
    with reading(engine) as connection:
        links = {row.id: row.url for row in connection.execute(sa.select(models.Link.__table__))}
        assert versions.current(connection, load(engine)) == version
    assert {links[link_id] for link_id in compiled.link_ids} == {"https://shop.example/a"}


def test_the_same_content_is_the_same_version(engine: sa.Engine) -> None:
    make_campaign(engine)
    first = versions.set_content(engine, "spring-sale", CONTENT, NOW)
    assert versions.set_content(engine, "spring-sale", CONTENT, LATER) == first
    assert versions.compile_current(engine, "spring-sale", LATER) == first


def test_another_content_is_another_version_and_the_first_stays(engine: sa.Engine) -> None:
    make_campaign(engine)
    first = versions.set_content(engine, "spring-sale", CONTENT, NOW)
    second = versions.set_content(engine, "spring-sale", replace(CONTENT, subject="Bye"), LATER)
    assert (second.number, second.content.subject) == (2, "Bye")
    with reading(engine) as connection:
        rows = connection.execute(sa.select(models.CampaignVersion.sha256).order_by(models.CampaignVersion.number)).scalars().all()
    assert rows == [first.sha256, second.sha256]
    assert load(engine).version_id == second.id


def test_a_link_keeps_its_id_through_all_versions_and_no_id_is_given_twice(engine: sa.Engine) -> None:
    make_campaign(engine)
    make_campaign(engine, "other")

    def links(key: str, *urls: str) -> list[int]:
        body = "".join(f'<a href="{url}">x</a>' for url in urls) + '<a href="{{ unsubscribe_url }}">Leave</a>'
        return list(CompiledMessage.from_bytes(versions.set_content(engine, key, replace(CONTENT, body=body), NOW).compiled).link_ids)

    a, b = "https://shop.example/a", "https://shop.example/b?x=1&y=ü"
    first = links("spring-sale", a)
    second = links("spring-sale", b, a)
    third = links("spring-sale", b)
    elsewhere = links("other", a)
    assert second[1] == first[0]
    assert third == second[:1]
    assert len({*first, *second, *third, *elsewhere}) == 3


def test_a_draft_keeps_a_content_that_cannot_be_compiled_yet(engine: sa.Engine) -> None:
    make_campaign(engine)
    early = replace(CONTENT, subject="Hello {{ first_name }}")
    assert versions.set_content(engine, "spring-sale", early, NOW).compiled == b""
    with pytest.raises(ContentError, match="first_name"):
        versions.compile_current(engine, "spring-sale", NOW)
    add(engine, models.Field(id=1, key="first_name", label="First name", type="text", created_at=NOW))
    compiled = versions.compile_current(engine, "spring-sale", LATER)
    assert (compiled.number, compiled.content) == (2, early)
    assert CompiledMessage.from_bytes(compiled.compiled).variables == ("first_name",)
    assert load(engine).version_id == compiled.id


def test_content_is_frozen_from_scheduled_on(engine: sa.Engine) -> None:
    for state, remedy in [
        ("scheduled", "unschedule"),
        ("building", "wait until it is sending"),
        ("sending", "--confirm"),
        ("paused", "--confirm"),
        ("finished", "frozen"),
        ("cancelled", "frozen"),
    ]:
        make_campaign(engine, state, state=state)
        with pytest.raises(StateError, match=remedy):
            versions.set_content(engine, state, CONTENT, NOW)


def test_a_confirmed_edit_makes_a_new_version_for_rows_not_claimed_yet(engine: sa.Engine) -> None:
    make_campaign(engine)
    first = versions.set_content(engine, "spring-sale", CONTENT, NOW)
    transact(engine, lambda connection: connection.execute(sa.update(models.Campaign).values(state="sending")))
    second = versions.set_content(engine, "spring-sale", replace(CONTENT, subject="Corrected"), LATER, confirmed=True)
    assert second.number == 2
    assert load(engine).version_id == second.id != first.id
    with pytest.raises(ContentError, match="nobody"):
        versions.set_content(engine, "spring-sale", replace(CONTENT, subject="{{ nobody }}"), LATER, confirmed=True)
    assert load(engine).version_id == second.id


def test_a_confirmation_does_not_open_what_is_over(engine: sa.Engine) -> None:
    for state in ("scheduled", "building", "finished", "cancelled"):
        make_campaign(engine, state, state=state)
        with pytest.raises(StateError, match="frozen"):
            versions.set_content(engine, state, CONTENT, NOW, confirmed=True)
