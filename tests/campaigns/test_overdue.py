"""What time demands of running and cancelled campaigns, and the second copy of an unknown message: rarely, once, and never forgotten."""

from __future__ import annotations

import datetime as dt
from collections import Counter

import pytest
import sqlalchemy as sa

from mail_pipelines.campaigns import lifecycle, overdue, unknown
from mail_pipelines.campaigns.campaign import Campaign, OnUnknown
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Delivery, State
from mail_pipelines.delivery import counters
from tests.campaigns.parts import NOW, counters_equal_ledger, fill_ledger, ledger_states, load, make_campaign

HOUR = dt.timedelta(hours=1)
MINUTE = dt.timedelta(minutes=1)


def resending(engine: sa.Engine, rows: dict[State, int], **changes: object) -> Campaign:
    """A sending campaign with `on_unknown: resend` that expires in two days, its rows in their states since `NOW`."""
    values = {"state": "sending", "on_unknown": OnUnknown.RESEND, "start_at": NOW, "expire_at": NOW + 48 * HOUR} | changes
    campaign = make_campaign(engine, **values)  # type: ignore[arg-type]
    fill_ledger(engine, campaign.id, rows, sort_key=int(NOW.timestamp()))
    return campaign


def become_unknown(engine: sa.Engine, campaign_id: int, since: dt.datetime) -> None:
    """All pending rows were sent again, and their answer is lost again."""

    def work(connection: sa.Connection) -> None:
        pending = (Delivery.campaign_id == campaign_id, Delivery.state == int(State.PENDING))
        moves: Counter[counters.Place] = Counter()
        for row in connection.execute(sa.select(Delivery.shard, Delivery.provider).where(*pending)):
            moves[row.shard, row.provider, State.PENDING, ""] -= 1
            moves[row.shard, row.provider, State.UNKNOWN, ""] += 1
        connection.execute(sa.update(Delivery).where(*pending).values(state=int(State.UNKNOWN), sort_key=int(since.timestamp())))
        counters.add(connection, campaign_id, 1, moves, since)

    transact(engine, work)


def test_unknown_rows_are_sent_again_after_six_hours_and_not_before(engine: sa.Engine) -> None:
    campaign = resending(engine, {State.UNKNOWN: 40, State.DELIVERED: 60})
    assert overdue.resend_unknown(engine, campaign, NOW + 6 * HOUR - dt.timedelta(seconds=1)) == 0
    assert overdue.resend_unknown(engine, campaign, NOW + 6 * HOUR) == 40
    assert ledger_states(engine, campaign.id) == {State.PENDING: 40, State.DELIVERED: 60}
    assert counters_equal_ledger(engine, campaign.id)
    with reading(engine) as connection:
        rows = connection.execute(sa.select(Delivery.attempt, Delivery.claim_id).where(Delivery.state == int(State.PENDING)).distinct()).all()
    # The same attempt, so the same Message-ID.
    assert rows == [(0, None)]


def test_a_row_is_sent_again_once(engine: sa.Engine) -> None:
    campaign = resending(engine, {State.UNKNOWN: 5})
    assert overdue.resend_unknown(engine, campaign, NOW + 6 * HOUR) == 5
    become_unknown(engine, campaign.id, NOW + 7 * HOUR)
    assert overdue.resend_unknown(engine, campaign, NOW + 20 * HOUR) == 0
    assert ledger_states(engine, campaign.id) == {State.UNKNOWN: 5}
    assert counters_equal_ledger(engine, campaign.id)


@pytest.mark.parametrize("change", [{"on_unknown": OnUnknown.HOLD}, {"state": "paused"}, {"state": "cancelled"}, {"held": "look"}])
def test_nothing_is_sent_again_unless_the_campaign_says_so_and_sends(engine: sa.Engine, change: dict[str, object]) -> None:
    campaign = resending(engine, {State.UNKNOWN: 5}, **change)
    assert overdue.resend_unknown(engine, load(engine, campaign.key), NOW + 10 * HOUR) == 0
    assert ledger_states(engine, campaign.id) == {State.UNKNOWN: 5}


def test_a_campaign_cancelled_meanwhile_sends_nothing_again(engine: sa.Engine) -> None:
    campaign = resending(engine, {State.UNKNOWN: 5})
    lifecycle.cancel(engine, campaign.key, NOW + 7 * HOUR)
    assert overdue.resend_unknown(engine, campaign, NOW + 7 * HOUR) == 0
    assert ledger_states(engine, campaign.id) == {State.UNKNOWN: 5}


def test_nothing_is_sent_again_shortly_before_the_expiry_or_after(engine: sa.Engine) -> None:
    campaign = resending(engine, {State.UNKNOWN: 5})
    for left in (10 * MINUTE, 0 * MINUTE, -5 * HOUR):
        assert overdue.resend_unknown(engine, campaign, NOW + 48 * HOUR - left) == 0
    assert overdue.resend_unknown(engine, campaign, NOW + 47 * HOUR) == 5


def test_sending_again_reads_the_index_and_not_the_campaign(engine: sa.Engine) -> None:
    campaign = resending(engine, {State.DELIVERED: 5000, State.UNKNOWN: 3})
    read: list[int] = []

    def rows_read(connection: sa.Connection) -> int:
        return sum(int(row[1]) for row in connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Handler_read%%'"))

    if engine.dialect.name == "sqlite":
        statements: list[str] = []
        sa.event.listen(engine, "before_cursor_execute", lambda _connection, _cursor, statement, *_rest: statements.append(statement))
        assert overdue.resend_unknown(engine, campaign, NOW + 6 * HOUR) == 3
        chosen = next(statement for statement in statements if statement.startswith("SELECT deliveries.contact_id"))
        with reading(engine) as connection:
            plan = " ".join(row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {chosen}", (1,) * chosen.count("?")))
        assert "ix_deliveries_campaign_id_shard_provider_state_sort_key" in plan
        return
    # One connection, so that the session's counters tell.
    single = sa.create_engine(engine.url, pool_size=1, max_overflow=0, isolation_level="READ COMMITTED")
    with single.connect() as connection:
        read.append(rows_read(connection))
    assert overdue.resend_unknown(single, campaign, NOW + 6 * HOUR) == 3
    with single.connect() as connection:
        read.append(rows_read(connection))
    single.dispose()
    assert read[1] - read[0] < 500


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_row_that_waited_to_be_sent_again_does_not_expire_as_if_never_sent(engine: sa.Engine, by_hand: bool) -> None:
    campaign = resending(engine, {State.UNKNOWN: 7, State.PENDING: 20, State.DEFERRED: 3})
    if by_hand:
        decided = unknown.decide(engine, unknown.Scope(campaign.id), unknown.Verdict.RESEND, NOW + 6 * HOUR, who="ops", why="test", confirmed=True)
        assert decided == 7
    else:
        assert overdue.resend_unknown(engine, campaign, NOW + 6 * HOUR) == 7
    assert lifecycle.expire_open_rows(engine, campaign, NOW + 48 * HOUR) == 23
    assert ledger_states(engine, campaign.id) == {State.UNRESOLVED: 7, State.EXPIRED: 23}
    assert counters_equal_ledger(engine, campaign.id)


def test_a_row_that_waited_to_be_sent_again_is_not_cancelled_as_if_never_sent(engine: sa.Engine) -> None:
    campaign = resending(engine, {State.UNKNOWN: 7, State.PENDING: 20})
    overdue.resend_unknown(engine, campaign, NOW + 6 * HOUR)
    assert lifecycle.cancel(engine, campaign.key, NOW + 7 * HOUR) == 20
    assert ledger_states(engine, campaign.id) == {State.UNRESOLVED: 7, State.CANCELLED: 20}
    assert counters_equal_ledger(engine, campaign.id)


def test_cancelled_campaigns_with_any_open_row_are_found(engine: sa.Engine) -> None:
    ended = make_campaign(engine, "at rest", state="cancelled", finished_at=NOW)
    fill_ledger(engine, ended.id, {State.CANCELLED: 10, State.UNRESOLVED: 1})
    make_campaign(engine, "never frozen", state="cancelled", finished_at=NOW)
    running = make_campaign(engine, "running", state="sending")
    fill_ledger(engine, running.id, {State.UNKNOWN: 10})
    for state in (State.PENDING, State.DEFERRED, State.CLAIMED, State.UNKNOWN):
        campaign = make_campaign(engine, f"with {state.name} row", state="cancelled", finished_at=NOW)
        fill_ledger(engine, campaign.id, {State.DELIVERED: 5, state: 1})
    with reading(engine) as connection:
        found = [campaign.key for campaign in overdue.cancelled_with_open_rows(connection)]
    assert found == ["with-pending-row", "with-deferred-row", "with-claimed-row", "with-unknown-row"]


def test_open_rows_come_from_the_counters_of_all_campaigns_at_once(engine: sa.Engine) -> None:
    first, second, empty = (make_campaign(engine, name, state="sending", start_at=NOW) for name in ("first", "second", "empty"))
    fill_ledger(engine, first.id, {State.PENDING: 3, State.DELIVERED: 5})
    transact(engine, lambda connection: connection.execute(sa.delete(Delivery)))
    fill_ledger(engine, second.id, {State.UNKNOWN: 2, State.CLAIMED: 1})
    with reading(engine) as connection:
        opened = overdue.open_rows(connection, [first, second, empty])
    assert opened == {first.id: {State.PENDING: 3}, second.id: {State.UNKNOWN: 2, State.CLAIMED: 1}, empty.id: {}}


def test_waiting_rows_need_closing_when_expired_or_cancelled(engine: sa.Engine) -> None:
    sending = make_campaign(engine, "sending", state="sending", start_at=NOW, expire_at=NOW + HOUR)
    cancelled = make_campaign(engine, "cancelled", state="cancelled", start_at=NOW, expire_at=NOW + HOUR)
    assert not overdue.needs_closing(sending, {State.PENDING: 1}, NOW)
    assert overdue.needs_closing(sending, {State.DEFERRED: 1}, NOW + HOUR)
    assert not overdue.needs_closing(sending, {State.UNKNOWN: 1, State.CLAIMED: 1}, NOW + HOUR)
    assert overdue.needs_closing(cancelled, {State.PENDING: 1}, NOW)
    assert not overdue.needs_closing(cancelled, {State.UNKNOWN: 1}, NOW)
