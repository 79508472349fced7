"""A provider that blocks one server, in real sessions."""

from __future__ import annotations

import datetime as dt
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.capacity import allotments, breakers
from mail_pipelines.capacity.breakers import CLOSED, OPEN
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Allotment, Delivery, State
from mail_pipelines.delivery.breakers import provider_rules
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.session import Report, Session, journal_of
from tests.dispatch.world import Running, RunningExim, Servers, World, make_world, write_play
from tests.parts.processes import stop, wait_for

pytestmark = pytest.mark.server
REFUSAL = "550 5.7.1 Unfortunately, messages from this server weren't sent. Part of its network is on our block list (S3150)."
ACCEPTS = '[[rule]]\ndomains = ["*"]\nreply_seconds = [0.01, 0.02]\n'


def restart(started: Running) -> None:
    """Start the server anew, and the destinations behind it, which have another play now."""
    started.stop()
    if isinstance(started, RunningExim):
        stop(started.destinations)
        del started.destinations
    started.start()


def session(world: World, server: servers.ServerInfo, run_id: str, reports: list[Report] | None = None) -> None:
    journal = journal_of(world.folders(server.key), server.kind)
    report = Session(world.engine, world.settings, server, world.campaign_id, world.campaign_key, 0, run_id, journal).run()
    if reports is not None:
        reports.append(report)


def providers(world: World) -> dict[str, dict[State, int]]:
    with reading(world.engine) as connection:
        rows = connection.execute(sa.select(Delivery.provider, Delivery.state, sa.func.count()).group_by(Delivery.provider, Delivery.state))
        found: dict[str, dict[State, int]] = {}
        for provider, state, count in rows:
            found.setdefault(provider, {})[State(state)] = count
        return found


def grants(world: World, server: servers.ServerInfo, provider: str) -> int:
    with reading(world.engine) as connection:
        left = sa.select(sa.func.sum(Allotment.granted - Allotment.used)).where(Allotment.server_id == server.id, Allotment.provider == provider)
        return int(connection.execute(left).scalar_one() or 0)


def test_a_provider_that_blocks_one_server_is_left_alone_and_tried_again(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """Microsoft refuses: the server stops sending there and only there, tries five, and goes on when they are accepted."""
    # A session that lingers less may end while its second claims take their time.
    world = make_world(engine, tmp_path / "home", recipients=600, kind=kind, linger_seconds=5)
    server, other = world.server(connections=4, per_second=200.0), world.server("s2")
    # Slow enough that the refusals of a first claim are recorded long before the last row is offered.
    servers.set_limits(engine, None, "microsoft", {"connections": 2, "per_second": 10.0})
    play = write_play(tmp_path / "play.toml", refuse_percent=100, refusals=[REFUSAL], domains=["microsoft.test"], reply_seconds=[0.01, 0.02])
    play.write_text(play.read_text() + ACCEPTS)
    started = running.start(world, server, play)
    reports: list[Report] = []
    sending = threading.Thread(target=session, args=(world, server, "run-1", reports))
    sending.start()
    (opened,) = wait_for(
        lambda: breakers.judge(engine, dt.datetime.now(dt.UTC)), seconds=120, what=lambda: f"the breaker of a session that ended so: {reports}"
    )
    sending.join(60)
    assert (opened.server_id, opened.provider, opened.state, opened.rule) == (server.id, "microsoft", OPEN, "blocked")
    ends = providers(world)
    refused = ends["microsoft"][State.BOUNCED]
    assert ends["microsoft"][State.PENDING] == 150 - refused > 0
    assert [ends[name] for name in ("google", "yahoo", "other")] == [{State.DELIVERED: 150}] * 3
    assert grants(world, server, "microsoft") <= 0 < grants(world, other, "microsoft")
    allotments.fill(engine, 10)
    assert grants(world, server, "microsoft") <= 0

    play.write_text(ACCEPTS)
    restart(started)
    assert breakers.try_now(engine, server.id, "microsoft", dt.datetime.now(dt.UTC))
    session(world, server, "run-2")
    delivered = providers(world)["microsoft"][State.DELIVERED]
    assert 0 < delivered <= 2 * provider_rules().trial_messages
    (closed,) = breakers.judge(engine, dt.datetime.now(dt.UTC))
    assert closed.state == CLOSED
    servers.set_limits(engine, None, "microsoft", {"connections": 4, "per_second": 200.0})
    session(world, server, "run-3")
    assert providers(world)["microsoft"] == {State.BOUNCED: refused, State.DELIVERED: 150 - refused}
    world.check_counters()
