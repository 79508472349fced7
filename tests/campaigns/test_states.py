"""The table of states is what happens: every move in it works, no other does, and a hold is beside it."""

from __future__ import annotations

import datetime as dt
import itertools
import threading

import pytest
import sqlalchemy as sa

from mail_pipelines.campaigns import states
from mail_pipelines.campaigns.states import MOVES, Actor, CampaignState, StateError
from mail_pipelines.database import models
from mail_pipelines.database.engine import transact
from tests.campaigns.parts import NOW, load, make_campaign

LATER = NOW + dt.timedelta(hours=1)


def test_every_move_of_the_table_and_no_other_can_be_made(engine: sa.Engine) -> None:
    table = {(known.source, known.target, known.actor) for known in MOVES}
    campaign = make_campaign(engine)

    def attempt(connection: sa.Connection, source: CampaignState, target: CampaignState, actor: Actor) -> bool:
        fresh = {"state": source.value, "updated_at": NOW, "started_at": None, "finished_at": None}
        connection.execute(sa.update(models.Campaign).values(fresh))
        if (source, target, actor) not in table:
            with pytest.raises(StateError, match="cannot be moved"):
                states.move(connection, campaign.id, source, target, actor=actor, now=LATER)
        else:
            states.move(connection, campaign.id, source, target, actor=actor, now=LATER)
        row = connection.execute(sa.select(models.Campaign.__table__)).one()
        moved = row.updated_at == LATER
        assert row.state == (target if moved else source)
        assert (row.finished_at is not None) == (moved and target.is_terminal and not source.is_terminal)
        return bool(moved)

    everything = itertools.product(CampaignState, CampaignState, Actor)
    assert {step for step in everything if transact(engine, lambda connection, step=step: attempt(connection, *step))} == table


def test_every_state_is_reached_from_draft_and_every_open_one_ends() -> None:
    def reached(start: CampaignState) -> set[CampaignState]:
        found, new = {start}, {start}
        while new:
            new = {known.target for known in MOVES if known.source in new} - found
            found |= new
        return found

    assert reached(CampaignState.DRAFT) == set(CampaignState)
    for state in CampaignState:
        assert any(other.is_terminal for other in reached(state))
        assert state.is_terminal == all(step.target is CampaignState.ARCHIVED for step in states.moves_from(state))


def test_a_move_from_another_state_names_the_state_and_what_is_possible(engine: sa.Engine) -> None:
    campaign = make_campaign(engine, state="paused")

    def pause(connection: sa.Connection) -> None:
        states.move(connection, campaign.id, CampaignState.SENDING, CampaignState.PAUSED, actor=Actor.OPERATOR, now=NOW)

    with pytest.raises(StateError, match=r"spring-sale is paused, not sending.*resume → sending \(by the operator\).*cancel → cancelled"):
        transact(engine, pause)


@pytest.mark.parametrize("state", ["finished", "archived"])
def test_nobody_leads_out_of_a_terminal_state(engine: sa.Engine, state: str) -> None:
    campaign = make_campaign(engine, state=state)
    with pytest.raises(StateError, match="nothing is possible"):
        transact(
            engine,
            lambda connection: states.move(connection, campaign.id, CampaignState.SENDING, CampaignState.PAUSED, actor=Actor.OPERATOR, now=NOW),
        )


def test_of_many_who_make_the_same_move_one_succeeds(engine: sa.Engine) -> None:
    campaign = make_campaign(engine, state="scheduled")
    outcomes: list[str] = []

    def build() -> None:
        try:
            transact(
                engine,
                lambda connection: states.move(connection, campaign.id, CampaignState.SCHEDULED, CampaignState.BUILDING, actor=Actor.CENTRE, now=NOW),
            )
            outcomes.append("moved")
        except StateError:
            outcomes.append("refused")

    builders = [threading.Thread(target=build) for _ in range(6)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert sorted(outcomes) == ["moved"] + ["refused"] * 5


def test_sending_begins_once(engine: sa.Engine) -> None:
    campaign = make_campaign(engine, state="building")
    sequence = [
        (CampaignState.BUILDING, CampaignState.SENDING, Actor.CENTRE, NOW),
        (CampaignState.SENDING, CampaignState.PAUSED, Actor.OPERATOR, LATER),
        (CampaignState.PAUSED, CampaignState.SENDING, Actor.OPERATOR, LATER),
    ]
    for source, target, actor, now in sequence:
        transact(
            engine,
            lambda connection, source=source, target=target, actor=actor, now=now: states.move(connection, campaign.id, source, target, actor=actor, now=now),
        )
    assert load(engine).started_at == NOW


def test_a_hold_stops_any_open_state_keeps_the_first_reason_and_is_released(engine: sa.Engine) -> None:
    for state in CampaignState:
        campaign = make_campaign(engine, state, state=state.value)
        assert transact(engine, lambda connection, number=campaign.id: states.hold(connection, number, "bounce rate 12 %", NOW)) is not state.is_terminal
        assert transact(engine, lambda connection, number=campaign.id: states.hold(connection, number, "second", NOW)) is False
        held = load(engine, state)
        assert held.state is state
        assert str(held.hold) == ("None" if state.is_terminal else "the campaign is held: bounce rate 12 %")
        assert transact(engine, lambda connection, number=campaign.id: states.release(connection, number, "tester", NOW)) is not state.is_terminal
        assert load(engine, state).hold is None
