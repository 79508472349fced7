"""What a late message asks again, on both databases."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.contacts import consent
from mail_pipelines.contacts.consent import Scope
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Campaign, Contact, Delivery, State
from mail_pipelines.delivery.recording import ClaimRef
from mail_pipelines.dispatch.claiming import wanted
from mail_pipelines.dispatch.holds import Kind
from tests.dispatch.world import World, make_world

NOW = dt.datetime(2026, 11, 24, tzinfo=dt.UTC)


def unsubscribe(scope: Scope) -> Callable[[World], None]:
    def work(world: World) -> None:
        transact(world.engine, lambda connection: consent.unsubscribe(connection, [1], scope=scope.kind, scope_id=scope.id, now=NOW))

    return work


def erase(world: World) -> None:
    transact(world.engine, lambda connection: connection.execute(sa.delete(Contact).where(Contact.id == 1)))


@pytest.mark.parametrize(
    ("decide", "claim", "first"),
    [
        (lambda _: None, True, True),
        (lambda world: world.set_campaign(state="paused"), False, False),
        (lambda world: world.set_server("s1", state="paused"), False, False),
        (lambda world: world.set_server("s1", state="draining"), True, True),
        *((functools.partial(World.hold, kind=kind), False, False) for kind in Kind),
        (lambda world: world.hold(Kind.PROVIDER, "yahoo"), True, True),
        (lambda world: [world.hold(), world.release()], True, True),
        (unsubscribe(Scope()), True, False),
        (unsubscribe(Scope("brand", 1)), True, False),
        (unsubscribe(Scope("brand", 2)), True, True),
        (erase, True, False),
    ],
    ids=["nothing", "pause", "server paused", "server draining", *Kind, "another provider", "release", "all", "brand", "another brand", "erasure"],
)
def test_what_was_decided_meanwhile(engine: sa.Engine, tmp_path: Path, decide: Callable[[World], object], claim: bool, first: bool) -> None:
    world = make_world(engine, tmp_path / "home", recipients=2)
    server = world.server()
    ref = ClaimRef(7, world.campaign_id, 0, "google", server.id, NOW)
    with reading(engine) as connection:
        assert connection.execute(sa.select(Campaign.brand_id)).scalars().all() == [1]
    hand = sa.update(Delivery).values(state=int(State.CLAIMED), claim_id=ref.id, server_id=server.id)
    transact(engine, lambda connection: connection.execute(hand))
    decide(world)
    with reading(engine) as connection:
        assert wanted.claim(connection, ref) is claim
        assert wanted.message(connection, ref, 1) is first
        assert wanted.message(connection, ref, 2) is claim
