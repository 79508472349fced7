"""Time and decisions end a campaign's rows in bulk: counted exactly, in bounded transactions, and never a row that a sender has in hand."""

from __future__ import annotations

import datetime as dt

import pytest
import sqlalchemy as sa
from sqlalchemy import event

from mail_pipelines.campaigns import lifecycle, open_rows, progress, shards
from mail_pipelines.campaigns.campaign import Priority
from mail_pipelines.campaigns.states import CampaignState, StateError
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import OPEN_STATES, Delivery, State
from mail_pipelines.delivery import counters
from tests.campaigns.parts import NOW, counters_equal_ledger, fill_ledger, ledger_states, load, make_campaign
from tests.parts.transactions import sizes_of_transactions

HOUR = dt.timedelta(hours=1)


def test_due_are_scheduled_started_and_not_held_urgent_first(engine: sa.Engine) -> None:
    make_campaign(engine, "later", state="scheduled", start_at=NOW + HOUR)
    make_campaign(engine, "held", state="scheduled", start_at=NOW - HOUR, held="check")
    make_campaign(engine, "draft", start_at=NOW - HOUR)
    make_campaign(engine, "sending", state="sending", start_at=NOW - HOUR)
    make_campaign(engine, "old", state="scheduled", start_at=NOW - HOUR)
    make_campaign(engine, "new", state="scheduled", start_at=NOW)
    make_campaign(engine, "urgent", state="scheduled", start_at=NOW, priority=Priority.URGENT)
    make_campaign(engine, "half", state="building", start_at=NOW)
    with reading(engine) as connection:
        assert [campaign.key for campaign in lifecycle.due(connection, NOW)] == ["urgent", "old", "new"]
        assert [campaign.key for campaign in lifecycle.building(connection)] == ["half"]
        assert [campaign.key for campaign in lifecycle.running(connection)] == ["sending"]


def test_open_rows_expire_when_their_time_is_over_and_not_before(engine: sa.Engine) -> None:
    campaign = make_campaign(engine, state="sending", start_at=NOW)
    fill_ledger(engine, campaign.id, {State.PENDING: 50, State.DEFERRED: 20, State.CLAIMED: 7, State.UNKNOWN: 3, State.DELIVERED: 20})
    before = ledger_states(engine, campaign.id)
    assert lifecycle.expire_open_rows(engine, campaign, NOW + 48 * HOUR - dt.timedelta(seconds=1)) == 0
    assert ledger_states(engine, campaign.id) == before
    assert lifecycle.expire_open_rows(engine, campaign, NOW + 48 * HOUR) == 70
    assert ledger_states(engine, campaign.id) == {State.EXPIRED: 70, State.CLAIMED: 7, State.UNKNOWN: 3, State.DELIVERED: 20}
    assert lifecycle.expire_open_rows(engine, campaign, NOW + 49 * HOUR) == 0
    assert counters_equal_ledger(engine, campaign.id)


def test_an_own_expiry_counts_instead_of_48_hours(engine: sa.Engine) -> None:
    campaign = make_campaign(engine, state="paused", start_at=NOW, expire_at=NOW + HOUR)
    fill_ledger(engine, campaign.id, {State.PENDING: 5})
    assert lifecycle.expire_open_rows(engine, campaign, NOW + HOUR) == 5


def test_expired_rows_count_in_their_minute_with_the_centre(engine: sa.Engine) -> None:
    campaign = make_campaign(engine, state="sending", start_at=NOW)
    fill_ledger(engine, campaign.id, {State.PENDING: 12})
    later = NOW + 48 * HOUR
    lifecycle.expire_open_rows(engine, campaign, later)
    with reading(engine) as connection:
        assert progress.per_minute(connection, campaign.id, State.EXPIRED, later + dt.timedelta(minutes=1), minutes=1) == 12
        assert connection.execute(sa.select(Delivery.sort_key).distinct()).scalars().all() == [int(later.timestamp())]


def test_many_rows_move_in_bounded_transactions(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all rows of a slice have the same sort key, as in an audience without engagement."""
    monkeypatch.setattr(open_rows, "CHUNK_ROWS", 100)
    campaign = make_campaign(engine, state="sending", start_at=NOW)
    fill_ledger(engine, campaign.id, {State.PENDING: 1000, State.DEFERRED: 130}, sort_key=5)
    with sizes_of_transactions(engine, "UPDATE deliveries") as sizes:
        assert lifecycle.expire_open_rows(engine, campaign, NOW + 48 * HOUR) == 1130
    assert sum(sizes) == 1130
    assert max(sizes) <= 100
    assert ledger_states(engine, campaign.id) == {State.EXPIRED: 1130}
    assert counters_equal_ledger(engine, campaign.id)


def test_cancel_ends_waiting_rows_and_leaves_those_in_hand(engine: sa.Engine) -> None:
    campaign = make_campaign(engine, state="sending")
    fill_ledger(engine, campaign.id, {State.PENDING: 30, State.DEFERRED: 5, State.CLAIMED: 4, State.UNKNOWN: 2, State.BOUNCED: 6})
    assert lifecycle.cancel(engine, campaign.key, NOW) == 35
    cancelled = load(engine)
    assert cancelled.state is CampaignState.CANCELLED
    assert cancelled.finished_at == NOW
    assert ledger_states(engine, campaign.id) == {State.CANCELLED: 35, State.CLAIMED: 4, State.UNKNOWN: 2, State.BOUNCED: 6}
    assert counters_equal_ledger(engine, campaign.id)


def test_cancelling_again_goes_on_where_a_killed_cancel_stopped(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_rows, "CHUNK_ROWS", 50)
    campaign = make_campaign(engine, state="paused")
    fill_ledger(engine, campaign.id, {State.PENDING: 400})
    commits = 0

    def die(_connection: object) -> None:
        nonlocal commits
        commits += 1
        if commits == 4:
            raise KeyboardInterrupt

    event.listen(engine, "commit", die)
    with pytest.raises(KeyboardInterrupt):
        lifecycle.cancel(engine, campaign.key, NOW)
    event.remove(engine, "commit", die)
    left = ledger_states(engine, campaign.id)[State.PENDING]
    assert 0 < left < 400
    assert counters_equal_ledger(engine, campaign.id)
    assert lifecycle.cancel(engine, campaign.key, NOW) == left
    assert ledger_states(engine, campaign.id) == {State.CANCELLED: 400}
    assert counters_equal_ledger(engine, campaign.id)


def test_a_finished_campaign_cannot_be_cancelled(engine: sa.Engine) -> None:
    make_campaign(engine, state="finished")
    with pytest.raises(StateError, match="finished"):
        lifecycle.cancel(engine, "spring-sale", NOW)


def test_unknown_rows_are_given_up_only_when_old_enough(engine: sa.Engine) -> None:
    campaign = make_campaign(engine, state="sending")
    fill_ledger(engine, campaign.id, {State.UNKNOWN: 9, State.DELIVERED: 1}, sort_key=int(NOW.timestamp()))
    assert lifecycle.give_up_unknown(engine, campaign.id, NOW + 72 * HOUR - dt.timedelta(seconds=1), 72) == 0
    assert lifecycle.give_up_unknown(engine, campaign.id, NOW + 72 * HOUR, 72) == 9
    assert ledger_states(engine, campaign.id) == {State.UNRESOLVED: 9, State.DELIVERED: 1}
    assert counters_equal_ledger(engine, campaign.id)


def test_one_open_row_of_any_kind_keeps_a_campaign_from_finishing(engine: sa.Engine) -> None:
    for state in OPEN_STATES:
        campaign = make_campaign(engine, f"with {state.name} row", state="sending")
        fill_ledger(engine, campaign.id, {State.DELIVERED: 40, state: 1})
        assert lifecycle.finish_if_done(engine, campaign.id, NOW) is False
        assert load(engine, campaign.key).state is CampaignState.SENDING


def test_a_sending_or_paused_campaign_without_open_rows_finishes_once(engine: sa.Engine) -> None:
    for state in ("sending", "paused"):
        campaign = make_campaign(engine, state, state=state)
        fill_ledger(engine, campaign.id, {state: 3 for state in State if state.is_final})
        assert lifecycle.finish_if_done(engine, campaign.id, NOW) is True
        finished = load(engine, state)
        assert finished.state is CampaignState.FINISHED
        assert finished.finished_at == NOW
        assert lifecycle.finish_if_done(engine, campaign.id, NOW) is False


def test_a_campaign_in_any_other_state_does_not_finish(engine: sa.Engine) -> None:
    for state in ("draft", "scheduled", "building", "cancelled"):
        campaign = make_campaign(engine, state, state=state)
        assert lifecycle.finish_if_done(engine, campaign.id, NOW) is False
        assert load(engine, state).state == state


def test_the_ledger_decides_about_the_end_even_if_counters_are_wrong(engine: sa.Engine) -> None:
    campaign = make_campaign(engine, state="sending")
    fill_ledger(engine, campaign.id, {State.DELIVERED: 10, State.PENDING: 1})
    with reading(engine) as connection:
        (shard, provider) = connection.execute(sa.select(Delivery.shard, Delivery.provider).where(Delivery.state == int(State.PENDING))).one()
    wrong = {(shard, provider, State.PENDING, ""): -1, (shard, provider, State.DELIVERED, ""): 1}
    transact(engine, lambda connection: counters.add(connection, campaign.id, 0, wrong, NOW))
    with reading(engine) as connection:
        assert progress.totals(connection, load(engine)).open == 0
    assert lifecycle.finish_if_done(engine, campaign.id, NOW) is False


def test_a_shard_is_open_by_its_own_rows(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "RECIPIENTS_PER_SHARD", 50)
    campaign = make_campaign(engine, state="sending")
    fill_ledger(engine, campaign.id, {State.DELIVERED: 110})

    def defer(connection: sa.Connection) -> int:
        row = connection.execute(sa.select(Delivery.shard, Delivery.provider).where(Delivery.contact_id == 1)).one()
        connection.execute(sa.update(Delivery).where(Delivery.contact_id == 1).values(state=int(State.DEFERRED)))
        moves = {(row.shard, row.provider, State.DELIVERED, ""): -1, (row.shard, row.provider, State.DEFERRED, "greylisted"): 1}
        counters.add(connection, campaign.id, 1, moves, NOW)
        return row.shard

    open_shard = transact(engine, defer)
    with reading(engine) as connection:
        assert {shard: open_rows.any_open(connection, campaign.id, shard) for shard in (0, 1)} == {open_shard: True, 1 - open_shard: False}
        assert open_rows.any_open(connection, campaign.id)


def test_the_probe_for_open_rows_reads_the_ledgers_index_only(engine: sa.Engine) -> None:
    """Right after a freeze MariaDB knows nothing about the ledger's contents; it once read a whole audience for each of 384 ranges."""
    campaign = make_campaign(engine, state="sending")
    fill_ledger(engine, campaign.id, {State.DELIVERED: 5000})
    everywhere: dict[counters.Place, int] = {(shard, provider, State.PENDING, ""): 1 for shard in range(2) for provider in ("google", "other", "yahoo")}
    transact(engine, lambda connection: counters.add(connection, campaign.id, 1, everywhere, NOW))
    with reading(engine) as connection:

        def rows_read() -> int:
            if engine.dialect.name == "sqlite":
                return 0
            return sum(int(row[1]) for row in connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Handler_read%%'"))

        before = rows_read()
        assert not open_rows.any_open(connection, campaign.id)
        assert rows_read() - before < 100


def test_totals_add_up_to_the_audience(engine: sa.Engine) -> None:
    campaign = make_campaign(engine, state="sending")
    counts = {state: number for number, state in enumerate(State, start=1)}
    fill_ledger(engine, campaign.id, counts)
    with reading(engine) as connection:
        totals = progress.totals(connection, load(engine)).check()
        assert progress.by_state(connection, campaign.id) == counts
        assert sum(progress.by_provider(connection, campaign.id).values()) == totals.audience
    assert totals.audience == sum(counts.values())
    assert totals.pending == counts[State.PENDING] + counts[State.CLAIMED]
    assert totals.open == sum(counts[state] for state in OPEN_STATES)


def test_totals_that_do_not_add_up_are_reported(engine: sa.Engine) -> None:
    campaign = make_campaign(engine, state="sending")
    fill_ledger(engine, campaign.id, {State.DELIVERED: 5})
    transact(engine, lambda connection: counters.add(connection, campaign.id, 2, {(0, "other", State.BOUNCED, ""): 1}, NOW))
    with reading(engine) as connection, pytest.raises(progress.SumsDiffer, match=r"is 6, but the audience is 5"):
        progress.totals(connection, load(engine)).check()
