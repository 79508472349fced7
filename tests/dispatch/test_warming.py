"""Servers that are warmed up, at work: they get the most engaged recipients, and no more of them than their day allows."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.capacity import allotments, warm_up, warm_up_rules
from mail_pipelines.capacity.warm_up_rules import rules
from mail_pipelines.database.engine import create_engine, database_now, reading, transact
from mail_pipelines.database.models import Delivery, State
from mail_pipelines.dispatch import openings, servers
from mail_pipelines.dispatch.catcher.store import kept
from mail_pipelines.dispatch.claims import OpenClaim
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.world import Servers, World, make_world, write_play
from tests.parts.processes import wait_for

CAP = 12


@pytest.fixture(autouse=True)
def _small_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    text = warm_up_rules.RULES.read_text(encoding="utf-8").partition("[curve.careful]")[0]
    path = tmp_path / "warm_up.toml"
    path.write_text(f"{text}[curve.careful]\nby_itself = true\ncaps = [{CAP}, 40]\n", encoding="utf-8")
    monkeypatch.setattr(warm_up_rules, "RULES", path)
    rules.cache_clear()
    yield
    rules.cache_clear()


def warming(world: World, key: str) -> servers.ServerInfo:
    server = world.server(key)

    def work(connection: sa.Connection) -> None:
        warm_up.set_by_hand(connection, key, database_now(connection), curve="careful")

    transact(world.engine, work)
    return server


def alive(world: World, *keys: str) -> None:
    for key in keys:
        world.set_server(key, heartbeat_at=dt.datetime.now(dt.UTC))


# --- the most engaged ---------------------------------------------------------------------------------------------


def ranks(world: World, claims: list[object]) -> list[int]:
    """The places in the order of sending of what was claimed, to google: 1 is the first."""
    order = {contact: number for number, contact in enumerate(range(1, 400, 4), 1)}
    return [order[row.contact_id] for claim in claims if isinstance(claim, OpenClaim) for row in claim.rows]


def test_the_best_ranks_are_left_to_warming_servers(engine: sa.Engine, tmp_path: Path) -> None:
    """Established ones are quicker, begin earlier and claim more; of a hundred recipients the first twelve are the new server's."""
    world = make_world(engine, tmp_path / "home", recipients=400)
    new, old, older = warming(world, "new"), world.server("old"), world.server("older")
    alive(world, "new", "old", "older")
    allotments.fill(engine, 10)
    # On MariaDB a claim goes on where the last one of its connection ended, and each server has its own.
    worlds = {server.key: replace(world, engine=create_engine(engine.url.render_as_string(hide_password=False))) for server in (new, old, older)}
    by_old: list[object] = [worlds[server.key].claim(server, limit=20) for server in (old, older, old)]
    by_new = [worlds["new"].claim(new, limit=5) for _ in range(4)]
    assert ranks(world, by_new) == list(range(1, CAP + 1))
    # Nobody waits: with the cap spent, all others are the established servers', also those before the place at which they began.
    allotments.fill(engine, 10)
    while isinstance(claim := worlds["older"].claim(older, limit=20), OpenClaim):
        by_old.append(claim)
    for one in worlds.values():
        one.engine.dispose()
    assert sorted(ranks(world, by_old)) == list(range(CAP + 1, 101))
    assert ranks(world, by_old)[:60] == list(range(CAP + 1, CAP + 61))


def test_nothing_is_left_that_nobody_would_take(engine: sa.Engine, tmp_path: Path) -> None:
    """The warming server claims nothing: the established one begins behind the best, and ends with them."""
    world = make_world(engine, tmp_path / "home", recipients=400)
    warming(world, "new")
    old = world.server("old")
    alive(world, "new", "old")
    allotments.fill(engine, 10)
    claims: list[object] = []
    while isinstance(claim := world.claim(old, limit=30), OpenClaim):
        claims.append(claim)
    found = ranks(world, claims)
    assert sorted(found) == list(range(1, 101))
    assert found[:60] == list(range(CAP + 1, CAP + 61))
    assert found.index(1) >= 100 - 2 * CAP


def test_nothing_is_left_to_a_server_that_does_not_speak(engine: sa.Engine, tmp_path: Path) -> None:
    world = make_world(engine, tmp_path / "home", recipients=400)
    warming(world, "new")
    old = world.server("old")
    alive(world, "old")
    allotments.fill(engine, 10)
    assert ranks(world, [world.claim(old, limit=20)]) == list(range(1, 21))


# --- a real send --------------------------------------------------------------------------------------------------


@pytest.mark.server
def test_a_warming_server_never_passes_its_cap_and_the_others_send_the_rest(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """Counted where the mail arrives. Two sessions at once on each of the two servers, and a campaign that gives many more rows than the cap."""
    world = make_world(engine, tmp_path / "home", recipients=600, kind=kind, shards=2, linger_seconds=1)
    fleet = {"new": warming(world, "new"), "old": world.server("old")}
    servers.set_limits(engine, None, "*", {"connections": 4, "per_second": 60.0})
    play = write_play(tmp_path / "play.toml", reply_seconds=[0.0, 0.1])
    for server in fleet.values():
        running.start(world, server, play)
    with reading(engine) as connection:
        begun = database_now(connection)

    def spent() -> bool:
        return len(taken_by(world, fleet["new"])) >= 4 * CAP

    def spent_or_over(sessions: list[SessionProcess]) -> bool:
        return spent() or not any(session.process.is_alive() for session in sessions)

    for tick in range(30):
        allotments.fill(engine, 10)
        with reading(engine) as connection:
            wanted = openings.find(connection, database_now(connection), slots=2, heartbeat_seconds=60, in_flight=())
        # Nobody waits for a server that is late: the best are the new one's only if it is there in time.
        first, then = ([opening for opening in wanted if (opening.server == "new") is new] for new in (True, False))
        sessions = [SessionProcess(world, opening.server, f"run-{tick}-{number}", opening.shard) for number, opening in enumerate(first)]
        wait_for(partial(spent_or_over, sessions), what="the claims of the new server")
        if spent():
            sessions += [SessionProcess(world, opening.server, f"run-{tick}-old-{number}", opening.shard) for number, opening in enumerate(then)]
        for session in sessions:
            session.wait()
        if world.states() == {State.DELIVERED: 600}:
            break
    with reading(engine) as connection:
        # At midnight another day begins, and with it another cap.
        days = 1 + (database_now(connection).date() - begun.date()).days
    assert world.states() == {State.DELIVERED: 600}
    arrived: Counter[tuple[str, str]] = Counter()
    for key in fleet:
        for message in kept(Path(world.settings.server.mail_folder) / key):
            arrived[key, message.recipient.partition("@")[2]] += 1
    assert arrived.total() == 600
    for domain in ("google.test", "microsoft.test", "yahoo.test", "small.test"):
        assert 0 < arrived["new", domain] <= CAP * days
        assert arrived["old", domain] >= 150 - CAP * days
    assert max(taken_by(world, fleet["new"])) <= 300
    world.check_counters()


def taken_by(world: World, server: servers.ServerInfo) -> list[int]:
    """Who is or was with a server, and was never refused."""
    query = sa.select(Delivery.contact_id).where(Delivery.server_id == server.id, Delivery.attempt == 0)
    with reading(world.engine) as connection:
        return list(connection.execute(query).scalars())
