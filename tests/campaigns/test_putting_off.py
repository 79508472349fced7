"""The freeze and the end of a campaign with a send window: each recipient waits for his own opening, counted, explained and never lost."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines.campaigns import audience, check, lifecycle, manifest, progress, putting_off, store, why
from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.campaigns.open_rows import Slice
from mail_pipelines.campaigns.send_window import SendWindow
from mail_pipelines.commands import campaign as command
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Contact, Delivery, State, WindowRows, WindowSpan
from mail_pipelines.delivery import upkeep
from mail_pipelines.dispatch import windows
from tests.campaigns.parts import NOW, contact_rows, counters_equal_ledger, ledger_states, load, make_campaign, make_people
from tests.dispatch.test_hold_commands import says
from tests.parts.kills import killed_at

OFFICE = SendWindow.from_document({"from": "09:00", "until": "18:00", "days": ["mon", "tue", "wed", "thu", "fri"], "zone": "Europe/Berlin"})
# At NOW, Monday 9:00 UTC, it is 10:00, 4:00 and 14:30; the last name means nothing, and nobody knows the zone of every fifth.
ZONES = ("Europe/Berlin", "America/New_York", "Asia/Kolkata", "Atlantis/Poseidonis", None)
PEOPLE = 50


def at(day: int, hour: int, minute: int = 0) -> int:
    return int(dt.datetime(2026, 3, day, hour, minute, tzinfo=dt.UTC).timestamp())


@pytest.fixture
def people(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, PEOPLE)

    def work(connection: sa.Connection) -> None:
        for number, zone in enumerate(ZONES):
            connection.execute(sa.update(Contact).where(Contact.id % len(ZONES) == number).values(time_zone=zone))

    transact(engine, work)


def frozen(engine: sa.Engine, settings: Settings, now: dt.datetime = NOW) -> Campaign:
    make_campaign(engine, state="scheduled", start_at=NOW, window=OFFICE)
    built = audience.build(engine, settings, "spring-sale", now)
    assert built.audience == PEOPLE
    assert counters_equal_ledger(engine, built.campaign.id)
    return built.campaign


def waiting(engine: sa.Engine) -> Counter[tuple[int, int, str | None]]:
    with reading(engine) as connection:
        rows = connection.execute(sa.select(Delivery.state, Delivery.sort_key, Delivery.reason)).tuples()
        return Counter((state, 0 if state == State.PENDING else key, reason) for state, key, reason in rows)


@pytest.mark.usefixtures("people")
def test_the_freeze_defers_whose_window_is_closed_until_it_opens(engine: sa.Engine, settings: Settings) -> None:
    campaign = frozen(engine, settings)
    # Nobody was ever engaged, so all fall due 91 seconds after New York has opened.
    assert waiting(engine) == {(State.PENDING, 0, None): 40, (State.DEFERRED, at(2, 14) + 91, "window"): 10}
    with reading(engine) as connection:
        progress.totals(connection, campaign).check()
        (opening,) = progress.openings(connection, campaign, NOW)
        counted = connection.execute(sa.select(WindowRows.time_zone, sa.func.sum(WindowRows.count)).group_by(WindowRows.time_zone)).tuples().all()
    assert (opening.at, opening.recipients, opening.zones, opening.last) == (dt.datetime(2026, 3, 2, 14, tzinfo=dt.UTC), 10, ("America/New_York",), False)
    # Who has no zone that anybody knows goes by the campaign's own.
    assert {zone: int(rows) for zone, rows in counted} == {"Europe/Berlin": 10, "America/New_York": 10, "Asia/Kolkata": 10, "": 20}


@pytest.mark.usefixtures("people")
def test_a_freeze_killed_at_any_moment_counts_everybody_once(engine: sa.Engine, settings: Settings, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "CHUNK_ROWS", 10)
    make_campaign(engine, state="scheduled", start_at=NOW, window=OFFICE)
    engine.dispose()
    for step in (30, 38, 46, 54):
        killed_at(step, database_url, lambda own, _: audience.build(own, settings, "spring-sale", NOW))
    assert audience.build(engine, settings, "spring-sale", NOW).audience == PEOPLE
    assert ledger_states(engine, 1) == {State.PENDING: 40, State.DEFERRED: 10}
    assert counters_equal_ledger(engine, 1)
    with reading(engine) as connection:
        assert connection.execute(sa.select(sa.func.sum(WindowRows.count))).scalar_one() == PEOPLE


@pytest.mark.usefixtures("people")
def test_who_still_waits_when_the_window_closes_is_put_off_until_it_opens_again(
    engine: sa.Engine, settings: Settings, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zone by zone, each as its own clock says; a call that is killed goes on."""
    campaign = frozen(engine, settings)
    monkeypatch.setattr(putting_off, "CHUNK_ROWS", 3)
    # 18:00 in Kolkata is 12:30 UTC, and claims are for two minutes.
    closes = dt.datetime(2026, 3, 2, 12, 28, tzinfo=dt.UTC)
    with reading(engine) as connection:
        assert not putting_off.closing(connection, closes - dt.timedelta(seconds=1), 120)
        assert putting_off.closing(connection, closes, 120)
    engine.dispose()
    for step in (8, 15):
        killed_at(step, database_url, lambda own, _: putting_off.put_off(own, campaign, closes, 120))
    putting_off.put_off(engine, campaign, closes, 120)
    tomorrow = (State.DEFERRED, at(3, 3, 30) + 91, "window")
    assert waiting(engine) == {(State.PENDING, 0, None): 30, (State.DEFERRED, at(2, 14) + 91, "window"): 10, tomorrow: 10}
    assert counters_equal_ledger(engine, campaign.id)
    with reading(engine) as connection:
        assert not putting_off.closing(connection, closes, 120)
        openings = progress.openings(connection, campaign, closes)
    assert [(opening.at.day, opening.at.hour, opening.recipients) for opening in openings] == [(2, 14, 10), (3, 3, 10)]
    # In the evening in New York, and again on the next: now nothing opens before the campaign's end on Wednesday at 9:00.
    evening = dt.datetime(2026, 3, 2, 23, tzinfo=dt.UTC)
    assert putting_off.put_off(engine, load(engine), evening, 120) == 40
    assert counters_equal_ledger(engine, campaign.id)
    night = evening + dt.timedelta(days=1)
    assert putting_off.put_off(engine, load(engine), night, 120) == 50
    assert waiting(engine) == {
        (State.DEFERRED, at(4, 8) + 91, "window"): 30,
        (State.DEFERRED, at(4, 3, 30) + 91, "window"): 10,
        (State.DEFERRED, at(4, 9) + 1 + 91, "no_window"): 10,
    }


@pytest.mark.usefixtures("people")
def test_whom_a_claim_has_put_off_meanwhile_is_counted_once(engine: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else more would seem to wait for an opening than do, and grants for those who wait for nothing would end."""
    campaign = frozen(engine, settings)
    evening = dt.datetime(2026, 3, 2, 23, tzinfo=dt.UTC)
    move = putting_off._move
    met: list[int] = []

    def meets_a_claim(connection: sa.Connection, campaign_id: int, part: Slice, late: list[Any], *rest: Any) -> int:
        if part.state is State.DEFERRED:
            contact_id, place, zone, due = late[0]
            opening = due - 91
            connection.execute(sa.update(Delivery).where(Delivery.contact_id == contact_id, Delivery.sort_key == place).values(sort_key=due, reason="window"))
            windows.count(connection, campaign_id, {(part.provider, zone, opening): 1})
            met.append(contact_id)
        return move(connection, campaign_id, part, late, *rest)

    monkeypatch.setattr(putting_off, "_move", meets_a_claim)
    moved = putting_off.put_off(engine, campaign, evening, 120)
    assert met
    assert counters_equal_ledger(engine, campaign.id)
    with reading(engine) as connection:
        openings = progress.openings(connection, campaign, evening)
    assert sum(opening.recipients for opening in openings) == moved + len(met) == PEOPLE


@pytest.mark.usefixtures("people")
def test_a_closing_reads_nobody_who_waits_for_another_opening(engine: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most rows of such a campaign wait for that. Whoever waits, and has moved to a zone that closes, waits on where he is counted; retries are put off."""
    campaign = frozen(engine, settings)
    read: list[int] = []
    portion = putting_off._portion

    def reads(*arguments: Any) -> Any:
        rows = portion(*arguments)
        read.extend(row.contact_id for row in rows)
        return rows

    monkeypatch.setattr(putting_off, "_portion", reads)
    # From New York, which opens at 14:00 UTC, to Kolkata, which closes at 12:30.
    moved = sa.update(Contact).where(Contact.time_zone == "America/New_York", Contact.id <= 10).values(time_zone="Asia/Kolkata")
    transact(engine, lambda connection: connection.execute(moved))
    assert putting_off.put_off(engine, campaign, dt.datetime(2026, 3, 2, 12, 28, tzinfo=dt.UTC), 120) == 10
    # All that are pending: the freeze has left them so where it was open.
    assert len(read) == 40
    evening = dt.datetime(2026, 3, 2, 23, tzinfo=dt.UTC)
    with reading(engine) as connection:
        counted = {opening.at.hour: opening.recipients for opening in progress.openings(connection, campaign, NOW)}
    assert counted == {14: 10, 3: 10}
    assert putting_off.put_off(engine, load(engine), evening, 120) == 38
    read.clear()
    # A retry of somebody in Berlin, due at eight in the evening.
    retry = sa.update(Delivery).where(Delivery.contact_id == 5).values(sort_key=at(3, 19), reason="mailbox_full")
    transact(engine, lambda connection: connection.execute(retry))
    assert putting_off.put_off(engine, load(engine), dt.datetime(2026, 3, 3, 12, 28, tzinfo=dt.UTC), 120) == 10
    assert len(read) == 11
    assert counters_equal_ledger(engine, campaign.id)
    assert putting_off.put_off(engine, load(engine), dt.datetime(2026, 3, 3, 17, tzinfo=dt.UTC), 120) == 30
    with reading(engine) as connection:
        assert connection.execute(sa.select(Delivery.sort_key).where(Delivery.contact_id == 5)).scalar_one() == at(4, 8)


@pytest.mark.usefixtures("people")
def test_whoever_is_never_reached_expires_and_is_told_why(engine: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = frozen(engine, settings)
    address = {zone: str(contact_rows([number])[0]["email"]) for number, zone in enumerate(ZONES, 5)}
    verdict = why.of_campaign(engine, settings, address["America/New_York"], campaign.key, NOW).verdict
    assert verdict == "deferred: it waits for its send window, which opens 2026-03-02 09:00 in America/New_York (14:00 UTC)"
    assert why.of_campaign(engine, settings, address["Europe/Berlin"], campaign.key, NOW).verdict == "pending: it waits for its turn"
    monkeypatch.setattr(command, "_now", lambda: NOW)
    monkeypatch.setattr(command, "open_engine", lambda: engine)
    assert "until Mon 14:00 UTC, 09:00 in America/New_York" in says("campaign", "status", campaign.key)
    assert "09:00 to 18:00 on mon, tue, wed, thu, fri by the recipient's clock" in says("campaign", "show", campaign.key)
    for day in (2, 3):
        putting_off.put_off(engine, load(engine), dt.datetime(2026, 3, day, 23, tzinfo=dt.UTC), 120)
    night = dt.datetime(2026, 3, 3, 23, 30, tzinfo=dt.UTC)
    verdict = why.of_campaign(engine, settings, address["America/New_York"], campaign.key, night).verdict
    assert verdict == "deferred: it is outside its send window, which does not open again before the campaign's end"
    end = NOW + dt.timedelta(hours=48)
    assert lifecycle.expire_open_rows(engine, load(engine), end) == PEOPLE
    verdict = why.of_campaign(engine, settings, address["America/New_York"], campaign.key, end).verdict
    assert verdict == "expired: it came to the end of its time: its send window did not open again before"
    assert ledger_states(engine, campaign.id) == {State.EXPIRED: PEOPLE}
    assert lifecycle.finish_if_done(engine, campaign.id, end)
    with reading(engine) as connection:
        progress.totals(connection, load(engine)).check()
        assert progress.openings(connection, load(engine), NOW) == []
    pruned = upkeep.prune(engine, end)
    assert pruned["window_spans"] > 1000
    assert pruned["window_rows"] > 0


def test_a_window_that_never_opens_is_named_before_the_start(engine: sa.Engine, settings: Settings) -> None:
    saturday = dt.datetime(2026, 3, 7, 8, tzinfo=dt.UTC)

    def problems(**changes: object) -> list[str]:
        name = f"c{len(list_keys(engine))}"
        make_campaign(engine, name, window=OFFICE, start_at=saturday, **changes)
        found = check.check(engine, settings, name, saturday, allow_unverified=True)
        return [str(problem) for problem in found if problem.part in ("window", "finish_by", "expire_at")]

    (problem,) = problems(expire_at=saturday + dt.timedelta(hours=40))
    assert problem.startswith("window: it never opens in Europe/Berlin between 2026-03-07T08:00:00+00:00 and 2026-03-09T00:00:00+00:00 (expire_at)")
    (problem,) = problems(expire_at=saturday + dt.timedelta(days=4), finish_by=saturday + dt.timedelta(days=1))
    assert problem == "finish_by: the send window opens in Europe/Berlin only at 2026-03-09T08:00:00+00:00, not before 2026-03-08T08:00:00+00:00"
    (problem,) = problems(expire_at=saturday + dt.timedelta(days=32))
    assert problem.startswith("expire_at: a campaign with a send window may last 31 days")
    assert problems(expire_at=saturday + dt.timedelta(days=4), finish_by=saturday + dt.timedelta(days=3)) == []
    # Claims want it to stay open for a lease.
    (problem,) = problems(expire_at=dt.datetime(2026, 3, 9, 8, 2, tzinfo=dt.UTC))
    assert problem.endswith("it has to be open for more than 120 s (sending.lease_seconds)")


def list_keys(engine: sa.Engine) -> list[str]:
    with reading(engine) as connection:
        return [campaign.key for campaign in store.select(connection, sa.true())]


def test_spans_are_written_once_for_all_zones(engine: sa.Engine) -> None:
    campaign = make_campaign(engine, state="building", start_at=NOW, window=OFFICE)
    for _ in range(2):
        putting_off.write_spans(engine, campaign, NOW)
    with reading(engine) as connection:
        berlin, own = (
            connection.execute(sa.select(WindowSpan.opens_at, WindowSpan.closes_at).where(WindowSpan.time_zone == zone).order_by(WindowSpan.opens_at))
            .tuples()
            .all()
            for zone in ("Europe/Berlin", "")
        )
        zones = connection.execute(sa.select(sa.func.count(WindowSpan.time_zone.distinct()))).scalar_one()
    assert berlin == own == [(at(2, 9), at(2, 17)), (at(3, 8), at(3, 17)), (at(4, 8), at(4, 9)), (at(4, 9) + 1, at(4, 9) + 1)]
    assert zones > 400
