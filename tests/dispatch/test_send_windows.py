"""Send windows at the far end: no message arrives outside of its recipient's window, whatever is killed, and everybody gets one in the end."""

from __future__ import annotations

import datetime as dt
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.campaigns import putting_off, store
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Contact, State, WindowRows, WindowSpan
from mail_pipelines.dispatch.claims import NothingClaimed
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.test_crashes import check_promise, settle
from tests.dispatch.world import Running, Servers, World, make_world, write_play
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.timeout(280), pytest.mark.server]

RECIPIENTS = 120
WINDOW = {"from": "09:00", "until": "18:00", "zone": "Europe/Berlin"}
# By zone of the recipients when their window is open, in seconds from now: open now and closing before all are served, soon, later.
ZONES = {"Europe/Berlin": ((-3600, 140), (160, 7200)), "Asia/Kolkata": ((-9000, -60), (18, 7200)), "America/New_York": ((28, 7200),), "": ((34, 7200),)}


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    """Recipients of three zones and of none, all rows pending; claims are for 12 seconds."""
    return make_world(engine, tmp_path / "home", recipients=RECIPIENTS, lease_seconds=12)


def open_windows(world: World, zones: dict[str, tuple[tuple[int, int], ...]]) -> dict[str, list[tuple[int, int]]]:
    """Give contacts these zones in turn, and the campaign these spans from now on."""
    with reading(world.engine) as connection:
        now = int(database_now(connection).timestamp())
    end = now + 48 * 3600 + 1
    spans = {zone: [(now + opens, now + closes) for opens, closes in zones[zone]] for zone in zones}
    rows = [(zone, *span) for zone in zones for span in [*spans[zone], (end, end)]]

    def work(connection: sa.Connection) -> None:
        connection.execute(
            sa.insert(WindowSpan), [{"campaign_id": 1, "time_zone": zone, "opens_at": opens, "closes_at": closes} for zone, opens, closes in rows]
        )
        # As the freeze counts them; here all of one provider.
        counted = [{"campaign_id": 1, "provider": "google", "time_zone": zone, "opens_at": now - 9000, "count": RECIPIENTS // len(zones)} for zone in zones]
        connection.execute(sa.insert(WindowRows), counted)
        for number, zone in enumerate(zones):
            connection.execute(sa.update(Contact).where(Contact.id % len(zones) == number).values(time_zone=zone or None))

    transact(world.engine, work)
    world.set_campaign(send_window=WINDOW)
    return spans


def arrivals(world: World) -> Iterator[tuple[str, float]]:
    """Zone of the recipient, and when the message arrived, of all that the catcher keeps."""
    with reading(world.engine) as connection:
        zones = dict(connection.execute(sa.select(Contact.address, Contact.time_zone)).tuples().all())
    for message in world.kept():
        yield zones[message.recipient] or "", message.at


def keep_windows(world: World) -> None:
    """As the sensor's run does."""
    with reading(world.engine) as connection:
        now = database_now(connection)
        lease_seconds = world.settings.sending.lease_seconds
        due = putting_off.closing(connection, now, lease_seconds)
        campaign = store.load(connection, world.campaign_key)
    if due:
        putting_off.put_off(world.engine, campaign, now, lease_seconds)


def test_nobody_is_mailed_outside_of_his_window_and_everybody_in_the_end(world: World, tmp_path: Path, running: Servers) -> None:
    server = world.server(connections=2, per_second=20.0)
    catcher: Running = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.3], greylist_percent=20, greylist_seconds=1))
    spans = open_windows(world, ZONES)
    run = SessionProcess(world, server.key, "killed")
    wait_for(lambda: len(world.kept()) > 3, seconds=60, what="sending")
    run.kill()
    settle(world, catcher)
    keep_windows(world)
    deadline, number = time.monotonic() + 200, 0
    while set(world.states()) & {State.PENDING, State.CLAIMED, State.DEFERRED}:
        assert time.monotonic() < deadline, world.states()
        number += 1
        SessionProcess(world, server.key, f"run-{number}").wait()
        keep_windows(world)
    check_promise(world, RECIPIENTS)
    late: defaultdict[str, list[float]] = defaultdict(list)
    for zone, at in arrivals(world):
        if not any(opens <= at <= closes for opens, closes in spans[zone]):
            late[zone].append(at - spans[zone][0][0])
    assert late == {}
    states = world.states()
    # What was in flight when the sender was killed may be unknown.
    assert states[State.DELIVERED] + states[State.UNKNOWN] == RECIPIENTS
    # A reply that did not come within four seconds makes another, until its late line is found.
    wait_for(lambda: world.states()[State.UNKNOWN] <= 8, what="late lines")
    assert Counter(zone for zone, _ in arrivals(world)).keys() == set(ZONES)


def test_a_claim_puts_off_whom_it_meets_outside_of_the_window(world: World) -> None:
    """Also those whose window would close before the lease ends; that is no attempt and no outcome."""
    server = world.server()
    world.grant(server)
    spans = open_windows(world, {"Europe/Berlin": ((-60, 7200),), "Asia/Kolkata": ((-60, 8), (600, 7200)), "": ()})
    claimed = world.claim(server)
    assert not isinstance(claimed, NothingClaimed)
    with reading(world.engine) as connection:
        zones = dict(connection.execute(sa.select(Contact.id, Contact.time_zone)).tuples().all())
        table = sa.text("SELECT contact_id, state, sort_key, attempt, reason FROM deliveries WHERE provider = 'google' AND state <> 1")
        waiting = connection.execute(table).all()
    assert {zones[row.contact_id] for row in claimed.rows} == {"Europe/Berlin"}
    assert len(claimed.rows) == len(waiting) // 2 == 10
    opening = spans["Asia/Kolkata"][1][0]
    for row in waiting:
        expected = {"Asia/Kolkata": (opening, "window"), None: (opening - 600 + 48 * 3600 + 1, "no_window")}[zones[row.contact_id]]
        assert (row.state, row.attempt, row.sort_key, row.reason) == (State.DEFERRED, 0, *expected)
    world.check_counters()
    # The next claim does not meet them again.
    assert isinstance(world.claim(server), NothingClaimed)
    assert world.usage(server, "google") == dict.fromkeys((900, 3600, 86400), 10)


def test_rows_are_put_off_at_once_when_their_window_closes(world: World) -> None:
    """Pending ones and retries, so that claims need not meet them; who is claimed is his sender's."""
    server = world.server()
    world.grant(server)
    spans = open_windows(world, {"Europe/Berlin": ((-60, 300), (600, 7200)), "America/New_York": ((-60, 7200),)})
    claimed = world.claim(server, limit=4)
    assert not isinstance(claimed, NothingClaimed)
    now = dt.datetime.fromtimestamp(spans["Europe/Berlin"][0][1], dt.UTC)
    with reading(world.engine) as connection:
        campaign = store.load(connection, world.campaign_key)
        assert putting_off.closing(connection, now, 12.0)
    mine = sum(row.contact_id % 2 == 0 for row in claimed.rows)
    assert putting_off.put_off(world.engine, campaign, now, 12.0) == RECIPIENTS // 2 - mine
    assert world.states() == {State.CLAIMED: 4, State.DEFERRED: RECIPIENTS // 2 - mine, State.PENDING: RECIPIENTS // 2 - 4 + mine}
    world.check_counters()
    with reading(world.engine) as connection:
        assert not putting_off.closing(connection, now, 12.0)
    assert putting_off.put_off(world.engine, campaign, now, 12.0) == 0
