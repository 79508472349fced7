"""What arrives at the far end of a real session is signed, and the key that verifies it is the one in the DNS."""

from __future__ import annotations

import email
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dkim
import pytest
import sqlalchemy as sa

from mail_pipelines.config import Settings
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Delivery, State
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.session import Session, journal_of
from mail_pipelines.domains import rotation, signing, store
from mail_pipelines.domains.domain import Names
from tests.dispatch.world import Running, World, make_world, write_play
from tests.domains.conftest import NOW, publish
from tests.domains.test_keys import traces_of
from tests.parts.dns import Zone

pytestmark = pytest.mark.server


@pytest.fixture
def world(engine: sa.Engine, settings: Settings, tmp_path: Path) -> Iterator[World]:
    """A campaign from shop.test to 60 recipients in two shards, and a catcher that takes everything."""
    made = make_world(engine, tmp_path / "home", recipients=60, shards=2, reply_timeout_seconds=60)
    store.add(engine, Names.of("shop.test"), made.settings.token_key(), NOW)
    catcher = Running(made, made.server(), write_play(tmp_path / "play.toml"))
    yield made
    catcher.stop()


def send(world: World, shard: int) -> None:
    with reading(world.engine) as connection:
        server = servers.find(connection, "s1")
    journal = journal_of(world.folders(server.key), "catcher")
    Session(world.engine, world.settings, server, world.campaign_id, world.campaign_key, shard, f"run-{shard}", journal).run()


def wait(world: World, *, shard: int, until: int | None) -> None:
    later = sa.update(Delivery).where(Delivery.shard == shard).values(not_before=until)
    transact(world.engine, lambda connection: connection.execute(later))


def publish_all(world: World, zone: Zone) -> None:
    with reading(world.engine) as connection:
        publish(zone, store.load(connection, "shop.test"))


def verified(world: World, zone: Zone) -> Counter[tuple[str, bool]]:
    """Messages by selector and dkimpy's answer."""
    answers = Counter()
    for message in world.kept():
        data = message.data()
        selector = email.message_from_bytes(data)["DKIM-Signature"].partition(" s=")[2].partition(";")[0]
        answers[selector, dkim.verify(data, dnsfunc=zone.text)] += 1
    return answers


def test_all_that_arrives_verifies_and_the_old_key_does_as_long_as_it_is_published(world: World, zone: Zone) -> None:
    # Half of them are due later.
    wait(world, shard=1, until=int(time.time()) + 3600)
    send(world, 0)
    for _ in range(2):
        rotation.rotate(world.engine, world.settings, "shop.test", NOW, allow_unverified=True)
    wait(world, shard=1, until=None)
    send(world, 1)
    assert world.states() == {State.DELIVERED: 60}
    assert set(verified(world, zone)) == {("mp20260302", False), ("mp20260302-2", False)}
    publish_all(world, zone)
    assert verified(world, zone) == {("mp20260302", True): 30, ("mp20260302-2", True): 30}
    zone.withdraw("mp20260302._domainkey.shop.test", "TXT")
    assert verified(world, zone) == {("mp20260302", False): 30, ("mp20260302-2", True): 30}


def test_the_message_is_from_the_domain_in_every_name(world: World, zone: Zone) -> None:
    send(world, 0)
    message = world.kept()[0]
    parsed = email.message_from_bytes(message.data())
    assert message.sender.endswith("@bounces.shop.test")
    assert parsed["Message-ID"].endswith("@bounces.shop.test>")
    assert parsed["List-Unsubscribe"].startswith("<https://links.shop.test/u/")
    assert " d=shop.test;" in parsed["DKIM-Signature"]


def test_the_key_is_nowhere_in_what_a_session_leaves_behind(world: World, zone: Zone) -> None:
    send(world, 0)
    with reading(world.engine) as connection:
        found = signing.sending_as(connection, "shop.test", 0, world.settings.token_key())
    assert found is not None
    left = b"".join(path.read_bytes() for path in Path(os.environ["MAIL_PIPELINES_HOME"]).rglob("*") if path.is_file())
    assert b"person2@microsoft.test" in left
    assert [trace for trace in traces_of(found.signer.key) if trace in left] == []
