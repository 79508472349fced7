"""Deciding about recipients in doubt: whom it concerns, that it is remembered, and that nothing else moves."""

from __future__ import annotations

import datetime as dt

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from mail_pipelines.campaigns import lifecycle, unknown
from mail_pipelines.campaigns.campaign import CampaignError, OnUnknown
from mail_pipelines.campaigns.states import StateError
from mail_pipelines.campaigns.unknown import Scope, Verdict
from mail_pipelines.commands import context
from mail_pipelines.commands import unknown as commands
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Claim, Delivery, DeliveryEvent, State
from mail_pipelines.delivery.events import RESENT, RESOLVED
from tests.campaigns.parts import NOW, add_contacts, counters_equal_ledger, fill_ledger, ledger_states, make_campaign

CLAIM = 77


def doubtful(engine: sa.Engine, counts: dict[State, int], **changes: object) -> int:
    """A sending campaign; contacts 1 and 2, if they are unknown, are so by claim 77."""
    campaign = make_campaign(engine, "doubt", **({"state": "sending"} | changes))
    add_contacts(engine, 1, sum(counts.values()))
    fill_ledger(engine, campaign.id, counts)
    claim = {"id": CLAIM, "campaign_id": campaign.id, "shard": 0, "provider": "google", "server_id": 1, "run_id": "run-1", "size": 2, "state": "closed"}
    place = {"incarnation": "-", "boot_id": "-", "journal_inode": 1, "journal_offset": 0, "opened_at": NOW, "lease_until": NOW, "closed_at": NOW}

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.insert(Claim).values(**claim, **place))
        connection.execute(sa.update(Delivery).where(Delivery.contact_id <= 2, Delivery.state == int(State.UNKNOWN)).values(claim_id=CLAIM))

    transact(engine, work)
    return campaign.id


def decide(engine: sa.Engine, scope: Scope, verdict: Verdict, *, confirmed: bool = False) -> int:
    return unknown.decide(engine, scope, verdict, NOW + dt.timedelta(hours=1), who="ops", why="asked a***@b.test", confirmed=confirmed)


def trail(engine: sa.Engine) -> list[tuple[int, str | None, str | None, dt.datetime]]:
    with reading(engine) as connection:
        columns = (DeliveryEvent.contact_id, DeliveryEvent.reason, DeliveryEvent.text, DeliveryEvent.occurred_at)
        rows = connection.execute(sa.select(*columns).where(DeliveryEvent.kind == RESOLVED).order_by(DeliveryEvent.contact_id))
        return [tuple(row) for row in rows]


@pytest.mark.parametrize(("verdict", "state"), [(Verdict.DELIVERED, State.DELIVERED), (Verdict.UNRESOLVED, State.UNRESOLVED), (Verdict.RESEND, State.PENDING)])
@pytest.mark.parametrize("scope", ["campaign", "claim", "contact"])
def test_a_decision_concerns_its_scope_and_is_remembered(engine: sa.Engine, verdict: Verdict, state: State, scope: str) -> None:
    campaign_id = doubtful(engine, {State.UNKNOWN: 5, State.DEFERRED: 2})
    chosen = {"campaign": Scope(campaign_id), "claim": Scope(campaign_id, claim_id=CLAIM), "contact": Scope(campaign_id, contact_id=2)}[scope]
    count = {"campaign": 5, "claim": 2, "contact": 1}[scope]
    assert decide(engine, chosen, verdict, confirmed=True) == count
    expected = {State.UNKNOWN: 5 - count, State.DEFERRED: 2, state: count}
    assert ledger_states(engine, campaign_id) == {name: rows for name, rows in expected.items() if rows}
    assert counters_equal_ledger(engine, campaign_id)
    assert len(trail(engine)) == count
    assert (2, verdict.value, "ops: asked ***@b.test", NOW + dt.timedelta(hours=1)) in trail(engine)
    assert decide(engine, chosen, verdict, confirmed=True) == 0
    assert len(trail(engine)) == count


def test_each_decision_about_the_same_message_is_remembered(engine: sa.Engine) -> None:
    campaign_id = doubtful(engine, {State.UNKNOWN: 1})
    for _ in range(2):
        assert decide(engine, Scope(campaign_id), Verdict.RESEND, confirmed=True) == 1
        transact(engine, lambda connection: connection.execute(sa.update(Delivery).values(state=int(State.UNKNOWN))))
        transact(engine, lambda connection: connection.execute(sa.text("UPDATE campaign_counters SET count = CASE WHEN state = 4 THEN 1 ELSE 0 END")))
    decide(engine, Scope(campaign_id), Verdict.DELIVERED)
    assert sorted(str(reason) for _, reason, _, _ in trail(engine)) == ["delivered", "resend", "resend"]
    with reading(engine) as connection:
        again = sa.select(sa.func.count()).select_from(DeliveryEvent).where(DeliveryEvent.kind == RESENT)
        assert connection.execute(again).scalar_one() == 1


def test_sending_again_needs_a_yes_and_a_running_campaign(engine: sa.Engine) -> None:
    campaign_id = doubtful(engine, {State.UNKNOWN: 3, State.PENDING: 1})
    with pytest.raises(StateError, match="--yes"):
        decide(engine, Scope(campaign_id), Verdict.RESEND)
    lifecycle.cancel(engine, "doubt", NOW)
    with pytest.raises(StateError, match="only a sending or paused campaign"):
        decide(engine, Scope(campaign_id), Verdict.RESEND, confirmed=True)
    assert decide(engine, Scope(campaign_id), Verdict.DELIVERED) == 3


def test_a_campaign_that_resends_needs_no_yes(engine: sa.Engine) -> None:
    campaign_id = doubtful(engine, {State.UNKNOWN: 3}, on_unknown=OnUnknown.RESEND)
    assert decide(engine, Scope(campaign_id), Verdict.RESEND) == 3
    with reading(engine) as connection:
        rows = connection.execute(sa.select(Delivery.attempt, Delivery.claim_id, Delivery.sort_key)).all()
    assert rows == [(0, None, 0)] * 3


def test_a_decision_needs_its_reason(engine: sa.Engine) -> None:
    campaign_id = doubtful(engine, {State.UNKNOWN: 1})
    with pytest.raises(CampaignError, match="--why"):
        unknown.decide(engine, Scope(campaign_id), Verdict.DELIVERED, NOW, who="ops", why=" ")


def test_the_scope_is_found_by_campaign_or_claim(engine: sa.Engine) -> None:
    campaign_id = doubtful(engine, {State.UNKNOWN: 2})
    make_campaign(engine, "other")
    with reading(engine) as connection:
        assert unknown.scope_of(connection, claim_id=CLAIM) == Scope(campaign_id, CLAIM)
        assert unknown.scope_of(connection, campaign="doubt", contact_id=1) == Scope(campaign_id, None, 1)
        with pytest.raises(CampaignError, match="another campaign than other"):
            unknown.scope_of(connection, campaign="other", claim_id=CLAIM)
        with pytest.raises(CampaignError, match="no claim 5"):
            unknown.scope_of(connection, claim_id=5)
        with pytest.raises(CampaignError, match="name a campaign"):
            unknown.scope_of(connection)


def test_the_command_line(engine: sa.Engine, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", database_url)
    monkeypatch.setenv("MAIL_PIPELINES_SENDING__TOKEN_KEY", "a key for tests only, long enough")
    monkeypatch.setattr(context.console, "width", 200)
    context.settings.cache_clear()
    doubtful(engine, {State.UNKNOWN: 3})

    def says(*words: str) -> str:
        result = CliRunner().invoke(commands.app, list(words))
        assert result.exception is None, result.exception
        return result.output

    assert "doubt" in says("list")
    listed = says("list", "--campaign", "doubt", "--limit", "2")
    assert "p***@outlook.com" in listed
    assert "person" not in listed
    assert "attempt 0, unknown since" in says("show", "doubt", "3")
    assert "1 unknown recipients are now delivered" in says("resolve", "--campaign", "doubt", "--contact", "3", "--as", "delivered", "--why", "she called")
    assert "2 unknown recipients are now to be sent again" in says("resolve", "--claim", str(CLAIM), "--as", "resend", "--yes", "--why", "no trace")
    assert any("she called" in str(text) for _, _, text, _ in trail(engine))
