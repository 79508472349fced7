"""A whole session through a real catcher: every row ends as the destination said, once, within the limits."""

from __future__ import annotations

import datetime as dt
import email
import email.policy
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines.campaigns import lifecycle, scheduling
from mail_pipelines.campaigns import states as campaign_states
from mail_pipelines.capacity import allotments
from mail_pipelines.contacts import consent
from mail_pipelines.database import migrate
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Allotment, Campaign, CampaignVersion, Claim, Contact, Delivery, DeliveryEvent, LedgerGeneration, Server, State
from mail_pipelines.delivery import counters
from mail_pipelines.delivery.recording import SLOT_SECONDS
from mail_pipelines.dispatch import errands, giving_way, lane, last_error, servers
from mail_pipelines.dispatch.claims import WrongServer
from mail_pipelines.dispatch.session import Report, Session, journal_of
from tests.dispatch.test_giving_way import URGENT, another_campaign, retries
from tests.dispatch.world import Running, Servers, World, make_world, write_play
from tests.parts.processes import wait_for

Start = Callable[..., tuple[World, servers.ServerInfo, Running]]
Stop = Callable[[World], None]

pytestmark = pytest.mark.server


@pytest.fixture
def start(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> Start:
    """Makes a world with one server that runs."""

    def begin(recipients: int = 100, limits: dict[str, Any] | None = None, sending: dict[str, Any] | None = None, shards: int = 1, **rule: Any) -> Any:
        world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind, shards=shards, **(sending or {}))
        server = world.server(**(limits or {}))
        return world, server, running.start(world, server, write_play(tmp_path / "play.toml", **rule))

    return begin


def session(world: World, server: servers.ServerInfo, run_id: str = "run-1", **options: Any) -> Session:
    journal = journal_of(world.folders(server.key), server.kind)
    return Session(world.engine, world.settings, server, world.campaign_id, world.campaign_key, 0, run_id, journal, **options)


def test_everybody_gets_one_message(start: Start) -> None:
    world, server, _ = start(recipients=300)
    report = session(world, server).run()
    assert report.reason == "the shard is final"
    assert world.states() == {State.DELIVERED: 300}
    assert world.copies() == dict.fromkeys(range(1, 301), 1)
    assert report.results[State.DELIVERED] == 300
    assert report.open_rows == 0
    assert world.open_claims() == 0
    world.check_counters()


@pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)
def test_a_claim_that_takes_longer_than_a_session_lingers_is_waited_for(start: Start) -> None:
    """As when the database has much to do; here somebody holds the campaign's row."""
    world, server, _ = start(recipients=8, sending={"linger_seconds": 1})
    looks: list[float] = []
    own = session(world, server, progress=lambda _: looks.append(time.monotonic()))
    with ThreadPoolExecutor() as pool:
        with world.engine.begin() as connection:
            connection.execute(sa.select(Campaign.id).where(Campaign.id == world.campaign_id).with_for_update())
            run = pool.submit(own.run)
            wait_for(lambda: len(looks) > 1 and (looks[-1] > looks[0] + 2 or own.stopping.is_set()), seconds=30, what="a session that has asked for long")
        assert run.result(60).reason == "the shard is final"
    assert world.states() == {State.DELIVERED: 8}


def test_what_falls_due_soon_is_waited_for_however_long_a_session_has_waited(start: Start) -> None:
    world, server, _ = start(recipients=1, sending={"linger_seconds": 500})
    own = session(world, server)

    def due_in(seconds: int) -> str | None:
        due = int(dt.datetime.now(dt.UTC).timestamp()) + seconds
        transact(world.engine, lambda connection: connection.execute(sa.update(Delivery).values(state=int(State.DEFERRED), sort_key=due)))
        return own._idle_reason({}, waited=550, looked=time.monotonic() - 200)

    transact(
        world.engine,
        lambda connection: counters.add(
            connection, 1, counters.CENTRE, {(0, "google", State.PENDING, ""): -1, (0, "google", State.DEFERRED, ""): 1}, dt.datetime.now(dt.UTC)
        ),
    )
    assert due_in(400) is None
    assert due_in(6000) == "nothing falls due soon"
    # Since the session looked last.
    assert due_in(-1) is None
    # It has been asked for in vain.
    assert due_in(-300) == "nothing falls due soon"


def test_a_session_whose_host_stood_still_sends_what_fell_due_meanwhile(start: Start) -> None:
    world, server, _ = start(recipients=4, sending={"linger_seconds": 1, "last_retry_seconds": 1}, greylist_percent=100, greylist_seconds=0.5)
    stood_still: list[int] = []

    def stand_still(_: Report) -> None:
        """Once, as rows wait for their retry and nothing else is done: until they have been due for longer than the session lingers."""
        with reading(world.engine) as connection:
            last = connection.execute(sa.select(sa.func.max(Delivery.sort_key)).where(Delivery.state == int(State.DEFERRED))).scalar_one()
        if stood_still or last is None or world.open_claims():
            return
        stood_still.append(last)
        wait_for(lambda: time.time() > stood_still[0] + 1.5, what="the moment")

    assert session(world, server, progress=stand_still).run().reason == "the shard is final"
    assert stood_still
    assert world.states() == {State.DELIVERED: 4}


def test_a_session_sends_its_own_shard_and_then_the_others(start: Start) -> None:
    world, server, _ = start(recipients=120, shards=3, limits={"connections": 1}, greylist_percent=20, greylist_seconds=1)
    report = session(world, server).run()
    assert report.reason == "the shard is final"
    assert report.shards == {0, 1, 2}
    assert world.states() == {State.DELIVERED: 120}
    assert world.copies() == dict.fromkeys(range(1, 121), 1)
    world.check_counters()
    with reading(world.engine) as connection:
        claimed = connection.execute(sa.select(Claim.provider, Claim.shard).order_by(Claim.opened_at)).all()
    assert {next(shard for provider, shard in claimed if provider == own) for own in {provider for provider, _ in claimed}} == {0}


def test_a_lane_whose_shard_has_no_more_goes_on_at_once_while_another_is_slow(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mail_pipelines.dispatch.session._LOOK_AROUND_SECONDS", 600.0)
    world, server, _ = start(recipients=96, shards=3)
    # Of its eight rows in the first shard the last one has its turn after so many times five seconds.
    servers.set_limits(world.engine, None, "google", {"connections": 4, "per_second": 0.2})
    own = session(world, server)

    def left(provider: str, shard: int) -> int:
        place = (Delivery.provider == provider, Delivery.shard == shard, Delivery.state != int(State.DELIVERED))
        with reading(world.engine) as connection:
            return connection.execute(sa.select(sa.func.count()).where(*place)).scalar_one()

    with ThreadPoolExecutor() as pool:
        run = pool.submit(own.run)
        wait_for(lambda: not any(left("yahoo", shard) for shard in range(3)), what="all shards of the quick one")
        assert left("google", 0) > 0
        own.report.interrupted = True
        assert run.result(90).reason == "asked to end"
    servers.set_limits(world.engine, None, "google", {"connections": 4, "per_second": 500.0})
    session(world, server, "run-2").run()
    assert world.states() == {State.DELIVERED: 96}


def test_a_session_that_only_waits_gives_way_to_whoever_has_work(start: Start) -> None:
    world, server, _ = start(recipients=4, sending={"linger_seconds": 100, "first_retry_seconds": 90, "last_retry_seconds": 90}, greylist_percent=100)
    world.settings = world.settings.model_copy(update={"server": world.settings.server.model_copy(update={"slots": 1})})
    with ThreadPoolExecutor() as pool:
        run = pool.submit(session(world, server).run)
        wait_for(lambda: world.states() == {State.DEFERRED: 4}, what="four deferrals")
        another_campaign(world, priority=0)
        assert run.result(90).reason == "campaign urgent waits for a slot of this server"


def test_a_session_without_a_grant_goes_on_when_it_gets_one_within_the_slot(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grants of a slot rise, when another campaign has ended, with a plan, or with a warm-up; a session that is there already does not wait for the next."""
    world, server, _ = start(recipients=8, sending={"linger_seconds": 2000})
    monkeypatch.setattr(allotments, "fill", lambda *_: None)
    monkeypatch.setattr(lane, "_ASK_AGAIN_SECONDS", 0.2, raising=False)
    # In the next slot, each provider would have one message more.
    wait_for(lambda: time.time() % SLOT_SECONDS < SLOT_SECONDS - 30, seconds=60, what="the next slot")
    world.grant(server, 1)
    with ThreadPoolExecutor() as pool:
        own = session(world, server)
        run = pool.submit(own.run)
        try:
            wait_for(lambda: world.states().get(State.DELIVERED) == 4, what="one message for each provider")
            transact(world.engine, lambda connection: connection.execute(sa.update(Allotment).values(granted=100)))
            wait_for(lambda: world.states() == {State.DELIVERED: 8}, what="the rest")
        finally:
            world.set_campaign(state="paused")
            own.report.interrupted = True
        run.result(90)


def test_a_rate_below_one_message_for_each_claim_is_waited_for_without_claims(start: Start) -> None:
    """Of two rows for each provider the second one's turn is later than a claim lasts."""
    world, server, _ = start(recipients=8, limits={"per_second": 0.2}, sending={"linger_seconds": 100})
    report = session(world, server).run()
    assert world.states() == {State.DELIVERED: 8}
    # One may be asked for while the first of its provider takes its turn.
    assert report.claims <= 12


def test_the_message_names_its_recipient_and_its_sender(start: Start) -> None:
    world, server, _ = start(recipients=1)
    session(world, server).run()
    (message,) = world.kept()
    parsed = email.message_from_bytes(message.data(), policy=email.policy.default)
    html = parsed.get_body(("html",))
    assert html is not None
    assert "Dear Name1" in html.get_content()
    assert parsed["Subject"] == "Hello Name1"
    assert message.recipient == "person1@google.test"
    assert message.sender.startswith("b+")
    assert parsed["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"


def test_refusals_end_as_bounced_and_deferrals_come_back(start: Start) -> None:
    world, server, _ = start(recipients=200, refuse_percent=20, greylist_percent=30, greylist_seconds=1)
    report = session(world, server).run()
    states = world.states()
    assert report.reason == "the shard is final"
    assert set(states) == {State.DELIVERED, State.BOUNCED}
    assert 20 <= states[State.BOUNCED] <= 65
    assert len(world.copies()) == states[State.DELIVERED]
    assert set(world.copies().values()) == {1}
    with world.engine.connect() as connection:
        suppressed = connection.execute(sa.text("SELECT COUNT(*) FROM suppressions WHERE reason = 'bounce'")).scalar_one()
        put_off = connection.execute(sa.text("SELECT COUNT(*) FROM delivery_events WHERE kind = 'greylisted'")).scalar_one()
    assert suppressed == states[State.BOUNCED]
    assert put_off > 20
    world.check_counters()


def test_refusals_keep_the_destinations_code_and_words(start: Start) -> None:
    at_recipient, at_body = "550 5.1.1 No such user here", "554 5.7.1 Not this content"
    world, server, _ = start(recipients=40, refuse_percent=30, refusals=[at_recipient], refuse_body_percent=40, body_refusals=[at_body])
    session(world, server).run()
    with reading(world.engine) as connection:
        said = connection.execute(sa.select(DeliveryEvent.code, DeliveryEvent.enhanced, DeliveryEvent.text).where(DeliveryEvent.kind == "bounced")).all()
        kept = connection.execute(sa.select(Delivery.code, Delivery.enhanced).where(Delivery.state == int(State.BOUNCED))).all()
    assert {f"{code} {enhanced} {text}" for code, enhanced, text in said} == {at_recipient, at_body}
    assert set(kept) == {(550, "5.1.1"), (554, "5.7.1")}
    assert len(kept) + len(world.copies()) == 40


def test_silence_and_drops_after_the_body_are_unknown_and_never_sent_again(start: Start) -> None:
    world, server, _ = start(recipients=120, drop_percent=10, silent_percent=5, silent_seconds=1.5, reply_seconds=[0.05, 0.1])
    report = session(world, server).run()
    states = world.states()
    assert report.reason == "all open rows are with other sessions or unknown"
    assert states[State.UNKNOWN] > 3
    assert states[State.DELIVERED] + states[State.UNKNOWN] == 120
    again = session(world, server, "run-2").run()
    assert again.claimed == 0
    assert set(world.copies().values()) == {1}
    # About half of the unknown ones were taken at the far end: they must not have been sent again.
    assert states[State.DELIVERED] < len(world.copies()) < 120
    world.check_counters()


def test_a_server_that_never_answers_ends_the_session_with_everything_unsent(start: Start) -> None:
    world, server, catcher = start(recipients=10, sending={"linger_seconds": 1})
    catcher.stop()
    report = session(world, server).run()
    assert "127.0.0.1" in report.reason
    assert world.states() == {State.PENDING: 10}
    assert world.open_claims() == 0


def pause(world: World) -> None:
    scheduling.pause(world.engine, world.campaign_key, dt.datetime.now(dt.UTC))


def cancel(world: World) -> None:
    lifecycle.cancel(world.engine, world.campaign_key, dt.datetime.now(dt.UTC))


def hold(world: World) -> None:
    assert transact(world.engine, lambda connection: campaign_states.hold(connection, world.campaign_id, "too many refusals", dt.datetime.now(dt.UTC)))


def go_on(world: World) -> None:
    scheduling.resume(world.engine, world.campaign_key, dt.datetime.now(dt.UTC), "tester")


# What stops a campaign, what the session says then, and what becomes of the rows that were not sent.
STOPS = pytest.mark.parametrize(
    ("stop", "reason", "left"),
    [
        (pause, "the campaign is paused", State.PENDING),
        (cancel, "the campaign is cancelled", State.CANCELLED),
        (hold, "the campaign is held: too many refusals", State.PENDING),
    ],
    ids=["pause", "cancel", "hold"],
)


@STOPS
def test_a_stop_acts_within_five_seconds_at_full_speed(start: Start, stop: Stop, reason: str, left: State) -> None:
    # More than are sent before the stop, and than claims can hold at it.
    recipients = 3000
    world, server, _ = start(recipients=recipients, limits={"connections": 16, "per_second": 250.0})
    reports: list[Report] = []
    thread = threading.Thread(target=lambda: reports.append(session(world, server).run()))
    thread.start()
    wait_for(lambda: len(world.kept()) > 200, what="sending")
    stop(world)
    stopped = time.time()
    thread.join(120)
    assert reports[0].reason == reason
    assert [message.at - stopped for message in world.kept() if message.at > stopped + 5] == []
    ended = world.states()
    assert set(ended) == {State.DELIVERED, left}
    assert ended[left] > 400
    assert world.copies() == dict.fromkeys(world.copies(), 1)
    assert len(world.copies()) == ended[State.DELIVERED]
    assert world.open_claims() == 0
    world.check_counters()
    if stop is pause:
        # Going on sends the rest, and nobody twice.
        go_on(world)
        assert session(world, server, "run-2").run().reason == "the shard is final"
        assert world.copies() == dict.fromkeys(range(1, recipients + 1), 1)


def test_a_session_at_work_stops_when_the_database_goes_back(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failure scenario 4: what it has claimed is older than the backup, so only the heartbeats of its server tell that there was another day."""
    monkeypatch.setenv("MAIL_PIPELINES_SERVER__HEARTBEAT_SECONDS", "600")
    world, server, _ = start(recipients=800, limits={"connections": 2, "per_second": 20.0})
    # The look that a session takes twice a second has not come yet.
    monkeypatch.setattr(servers, "check_time", lambda *_: dt.datetime.now(dt.UTC))
    with ThreadPoolExecutor() as pool:
        run = pool.submit(session(world, server).run)
        wait_for(lambda: len(world.kept()) > 0, what="sending")
        earlier = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)
        transact(world.engine, lambda connection: connection.execute(sa.update(Server).values(heartbeat_at=earlier)))
        with pytest.raises(WrongServer, match="went back in time"):
            run.result()
    assert len(world.copies()) < 400


def test_an_address_suppressed_while_sending_is_not_mailed(start: Start) -> None:
    # So slow that claims come to the late ones some seconds after they are suppressed.
    world, server, _ = start(recipients=800, limits={"connections": 2, "per_second": 20.0})
    thread = threading.Thread(target=lambda: session(world, server).run())
    thread.start()
    wait_for(lambda: len(world.kept()) > 50, what="sending")
    late = list(range(601, 801))
    transact(world.engine, lambda connection: consent.unsubscribe(connection, late, scope="all", now=dt.datetime.now(dt.UTC)))
    when = dt.datetime.now().timestamp()
    thread.join(120)
    mailed = {contact for contact in world.copies() if contact > 600}
    assert world.states()[State.SUPPRESSED] == 200 - len(mailed)
    assert not [m for m in world.kept() if m.at > when + 5 and int(m.recipient.removeprefix("person").partition("@")[0]) > 600]
    assert len(mailed) < 100


def test_two_runs_on_one_shard_send_nothing_twice_and_keep_the_limits(start: Start) -> None:
    world, server, _ = start(recipients=400, limits={"connections": 4, "per_second": 40.0}, reply_seconds=[0.0, 0.2])
    threads = [threading.Thread(target=session(world, server, f"run-{number}").run) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert world.states() == {State.DELIVERED: 400}
    assert set(world.copies().values()) == {1}
    # Per provider 40 a second; the destination's reply time is part of what the far end sees, so a window is widened by its spread.
    for provider in ("google", "small"):
        times = sorted(message.at for message in world.kept() if f"{provider}.test" in message.recipient)
        for start_of_window in times:
            assert sum(1 for moment in times if start_of_window <= moment < start_of_window + 1) <= 40 * 1.2 + 1
    world.check_counters()


@pytest.mark.crosswise
def test_a_session_ends_in_order_for_an_urgent_campaign(start: Start) -> None:
    # More than it sends before it looks who waits.
    world, server, _ = start(recipients=1600, limits={"per_second": 8.0})
    world.settings = world.settings.model_copy(update={"server": world.settings.server.model_copy(update={"slots": 1})})
    with ThreadPoolExecutor() as pool:
        report = pool.submit(session(world, server).run)
        wait_for(lambda: world.states()[State.DELIVERED] > 0, what="a first message")
        another_campaign(world, priority=3)
        assert report.result(60).reason == "campaign urgent has a higher priority and waits for a slot of this server"
    assert set(world.states()) == {State.DELIVERED, State.PENDING}
    assert len(world.copies()) == world.states()[State.DELIVERED]
    assert world.open_claims() == 0


@pytest.mark.crosswise
def test_a_session_goes_on_with_a_newer_schema_and_ends_when_its_version_is_too_old_for_it(start: Start) -> None:
    """The centre is upgraded while it sends: by one version, and then so far that only newer ones may send."""
    world, server, _ = start(recipients=1600, limits={"per_second": 8.0})

    def upgrade(oldest: str) -> None:
        def work(connection: sa.Connection) -> None:
            connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
            connection.execute(sa.update(LedgerGeneration).values(oldest_schema=oldest))

        transact(world.engine, work)

    with ThreadPoolExecutor() as pool:
        run = pool.submit(session(world, server).run)
        wait_for(lambda: world.states()[State.DELIVERED] > 0, what="a first message")
        upgrade(migrate.newest_revision())
        before = world.states()[State.DELIVERED]
        # As much as all providers take in longer than it goes without a look.
        wait_for(lambda: world.states()[State.DELIVERED] > before + 250, seconds=90, what="mail of a version that is one older")
        upgrade("9999")
        with pytest.raises(migrate.SchemaOutdated, match=f"too old .* knows schema {migrate.newest_revision()}, .* needs 9999 at least"):
            run.result(90)
    states = world.states()
    assert set(states) == {State.DELIVERED, State.PENDING}
    assert len(world.copies()) == states[State.DELIVERED]
    assert world.open_claims() == 0
    # So the next heartbeat says it, and `server show` to whoever looks.
    told = last_error.read(world.folders(server.key))
    assert told is not None
    assert "too old for the central database" in told["text"]
    with pytest.raises(migrate.SchemaOutdated, match="needs 9999 at least"):
        migrate.require_schema(world.engine)


@pytest.mark.crosswise
def test_a_session_sends_the_retries_of_an_urgent_campaign_and_goes_on(start: Start) -> None:
    """In one run, and over the one connection that there is."""
    world, server, _ = start(recipients=320, limits={"connections": 1, "per_second": 4.0})
    world.settings = world.settings.model_copy(update={"server": world.settings.server.model_copy(update={"slots": 1})})
    with ThreadPoolExecutor() as pool:
        run = pool.submit(session(world, server).run)
        wait_for(lambda: world.states()[State.DELIVERED] > 0, what="a first message")
        retries(world)

        def urgent() -> list[int]:
            tokens = [world.ring().read_delivery(message.token)[0] for message in world.kept()]
            return sorted(token.contact_id for token in tokens if token.campaign_id == URGENT)

        wait_for(lambda: urgent() == [1, 2], what="the retries")
        before = world.states()[State.DELIVERED]
        report = run.result(90)
    assert before < 320
    with reading(world.engine) as connection:
        claimed = dict(connection.execute(sa.select(Claim.campaign_id, sa.func.sum(Claim.size)).group_by(Claim.campaign_id)).tuples().all())
    # Rows that a claim gave back, if the host stood still, were claimed twice.
    assert (report.reason, report.errands, report.claimed) == ("the shard is final", claimed[URGENT], claimed[world.campaign_id])
    assert urgent() == [1, 2]
    assert world.states() == {State.DELIVERED: 320}
    assert world.copies() == dict.fromkeys(range(1, 321), 1)
    assert world.open_claims() == 0


def test_a_fault_of_an_urgent_campaign_stops_nobody_elses_session(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    do = errands.Errands.do

    def do_one(self: errands.Errands, errand: giving_way.Errand, until: float) -> None:
        """And look for no other: when the server has settled what the fault has left, that campaign has rows that are worth a slot."""
        do(self, errand, until)
        monkeypatch.setattr("mail_pipelines.dispatch.session._GIVE_WAY_SECONDS", math.inf)

    monkeypatch.setattr(errands.Errands, "do", do_one)
    world, server, _ = start(recipients=240, limits={"connections": 1, "per_second": 4.0})
    world.settings = world.settings.model_copy(update={"server": world.settings.server.model_copy(update={"slots": 1})})
    broken = {"id": 9, "campaign_id": URGENT, "number": 1, "source": {}, "sha256": "0" * 64, "compiled": b"no message", "created_at": dt.datetime.now(dt.UTC)}
    with ThreadPoolExecutor() as pool:
        run = pool.submit(session(world, server).run)
        wait_for(lambda: world.states()[State.DELIVERED] > 0, what="a first message")
        # It must not be sent before it is broken.
        retries(world, state="paused")
        transact(world.engine, lambda connection: connection.execute(sa.insert(CampaignVersion).values(**broken)))
        transact(world.engine, lambda connection: connection.execute(sa.update(Campaign).where(Campaign.id == URGENT).values(version_id=9, state="sending")))
        allotments.fill(world.engine, 10)
        report = run.result(90)
    assert (report.reason, report.errands) == ("the shard is final", 0)
    assert world.states() == {State.DELIVERED: 240}
    error = last_error.read(world.folders(server.key))
    assert error is not None
    assert error["what"] == "errand of session run-1 for campaign urgent"


def test_a_value_that_makes_no_message_stops_nobody_else(start: Start) -> None:
    world, server, _ = start(recipients=20)
    transact(world.engine, lambda connection: connection.execute(sa.update(Contact).where(Contact.id == 3).values(email="not an address")))
    report = session(world, server).run()
    assert report.results[State.SUPPRESSED] == 1
    assert world.states() == {State.DELIVERED: 19, State.SUPPRESSED: 1}
    world.check_counters()


@pytest.mark.parametrize("state", ["draft", "scheduled", "building", "paused", "cancelled", "finished"])
def test_no_state_but_sending_sends(start: Start, state: str) -> None:
    world, server, _ = start(recipients=10)
    world.set_campaign(state=state)
    report = session(world, server).run()
    assert report.claimed == 0
    assert report.reason == f"the campaign is {state}"
    assert world.kept() == []


def test_a_provider_that_limits_its_rate_is_asked_again_later(start: Start) -> None:
    # Few enough that even the worst luck, all but one limited in each round (5 + 4 + 3 + 2 + 1), gives the breaker for limited rates no reason.
    world, server, _ = start(recipients=6, per_second=4)
    report = session(world, server).run()
    assert report.reason == "the shard is final"
    assert set(world.copies().values()) == {1}
    assert len(world.copies()) == 6
