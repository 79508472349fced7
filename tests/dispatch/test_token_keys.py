"""A server is given a token key of its own when it is at rest, signs its mail by it, and a log under another key proves nothing."""

from __future__ import annotations

import datetime as dt
import os
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.campaigns import check as campaign_check
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Claim, DkimKey, State
from mail_pipelines.dispatch import accounts, registry, servers, settlement, token_keys
from mail_pipelines.dispatch.catcher import log as catcher_log
from mail_pipelines.dispatch.claims import OpenClaim
from mail_pipelines.dispatch.journal import Kind, Outcome
from mail_pipelines.dispatch.recovery import standing, steps
from mail_pipelines.dispatch.recovery.reading import take_part
from mail_pipelines.dispatch.recovery.standing import Part
from mail_pipelines.dispatch.session import journal_of
from mail_pipelines.dispatch.token_keys import InUse
from mail_pipelines.doctor.fleet import check_server_keys
from mail_pipelines.domains import keys, rotation, store
from mail_pipelines.domains.domain import KeyState, Names
from mail_pipelines.domains.signing import sending_as
from mail_pipelines.messages.keyring import CENTRE, derive
from mail_pipelines.messages.tokens import DeliveryToken, fingerprint, sign_delivery
from tests.dispatch.test_audit import Log
from tests.dispatch.world import World, make_world

NOW = dt.datetime.now(dt.UTC)
KEY = b"a key for tests"
OWN = derive(KEY, "s1")


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    return make_world(engine, tmp_path / "home", recipients=20)


def with_key(world: World, key: bytes) -> World:
    """The world as a host sees it that has this token key."""
    settings = world.settings
    return replace(world, settings=settings.model_copy(update={"sending": settings.sending.model_copy(update={"token_key": key.decode()})}))


def seen(world: World, key: str = "s1") -> servers.ServerInfo:
    with reading(world.engine) as connection:
        return servers.find(connection, key)


# --- a change of the key ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["to its own", "back", "none"])
def test_a_log_under_another_key_proves_nothing(world: World, change: str) -> None:
    """Of five rows in hand one is at its destination, of one the end is known; then the process comes back, with another key or with the same."""
    before, after = {"to its own": (KEY, OWN), "back": (OWN, KEY), "none": (OWN, OWN)}[change]
    server = world.server()
    world.grant(server)
    claim = world.claim(server, limit=5)
    assert isinstance(claim, OpenClaim)
    permit = f"c{claim.ref.id}.0"
    tokens = [sign_delivery(DeliveryToken(world.campaign_id, row.contact_id, row.attempt), before) for row in claim.rows]
    lines = [catcher_log.mark(permit), *(catcher_log.intent(token, 99_999_999, permit) for token in tokens[:2])]
    lines.append(catcher_log.done(tokens[0], Outcome(Kind.DELIVERED, 250), permit))
    journal = journal_of(world.folders("s1"), server.kind)
    journal.path.write_bytes(b"".join(line + b"\n" for line in lines))
    transact(world.engine, lambda connection: connection.execute(sa.update(Claim).values(journal_inode=journal.end().inode, journal_offset=0)))
    own = with_key(world, after)
    done = settlement.settle_all(own.engine, own.sender(server), own.folders("s1"), journal, own.settings.sending, own.settings.token_key())
    assert done.claims == 1
    # Never pending: the next claim would mail them once more.
    proved = {State.DELIVERED: 1, State.UNKNOWN: 1, State.PENDING: 18}
    assert world.states() == (proved if change == "none" else {State.UNKNOWN: 5, State.PENDING: 15})
    world.check_counters()


@pytest.mark.parametrize("changed", [True, False])
def test_a_recovery_does_not_rely_on_a_log_under_another_key(world: World, changed: bool) -> None:
    """The restored database is of before the key was changed: what the log has from before is mail that nobody else can tell of."""
    server = world.server()
    world.set_server("s1", kind="exim", heartbeat_at=NOW)
    Log(with_key(world, KEY if changed else OWN), server).delivered(1)
    own = with_key(world, OWN)
    folders, server = own.folders("s1"), seen(world)
    journal = journal_of(folders, "exim")
    now = NOW.strftime("%Y-%m-%d %H:%M:%S.000")
    journal.path.write_text(journal.path.read_text().replace("2026-11-24 12:15:42.927", now))
    os.utime(journal.path, (NOW.timestamp() - 3600,) * 2)
    servers.recall(own.engine, folders)
    steps.begin(own.engine, NOW)
    assert not take_part(own.engine, own.settings, server, own.sender(server), journal)
    with reading(own.engine) as connection:
        found = standing.newest(connection)
    assert found is not None
    (part,) = found.servers
    assert part.part is (Part.INCOMPLETE if changed else Part.READ)
    assert part.note == ("1 messages are under another token key than its server's" if changed else None)
    steps.finish(own.engine, world.settings, NOW)
    assert world.states() == ({State.UNKNOWN: 20} if changed else {State.DELIVERED: 1, State.PENDING: 19})


def test_a_key_is_given_to_a_server_at_rest(world: World) -> None:
    server = world.server()
    world.grant(server)

    def give() -> bytes:
        return accounts.token_key_of(world.engine, "s1", KEY)

    # One that never ran, in whatever state.
    assert give() == OWN
    world.set_server("s1", heartbeat_at=NOW)
    for state in ("warming", "active"):
        world.set_server("s1", state=state)
        with pytest.raises(accounts.KeyHeld, match="server drain s1"):
            give()
    claim = world.claim(server, limit=5)
    assert isinstance(claim, OpenClaim)
    world.set_server("s1", state="draining")
    with pytest.raises(accounts.KeyHeld, match="when `mail-pipelines server show s1` says that it is drained"):
        give()
    # Asked again while it works under the key that it was given: the same one.
    world.set_server("s1", state="active", health={token_keys.FACT: fingerprint(OWN)})
    assert give() == OWN
    world.set_server("s1", state="draining", health={token_keys.FACT: fingerprint(KEY)})
    settlement.give_up(world.engine, server.id)
    assert give() == OWN


def test_the_centre_accepts_the_keys_of_all_servers_there_ever_were(world: World) -> None:
    fleet = {key: world.server(key) for key in ("s1", "s2", "s3")}
    accounts.revoke(world.engine, "s2", NOW)
    registry.retire_lost(world.engine, "s3")
    with reading(world.engine) as connection:
        ring = token_keys.accepted(connection, KEY)
    token = DeliveryToken(1, 2, 3)
    for name, server in fleet.items():
        assert ring.read_delivery(sign_delivery(token, derive(KEY, name))) == (token, server.id)
    assert ring.read_delivery(sign_delivery(token, KEY)) == (token, CENTRE)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, InUse.UNTOLD),
        ({token_keys.FACT: fingerprint(KEY)}, InUse.INSTALLATION),
        ({token_keys.FACT: fingerprint(OWN)}, InUse.OWN),
        ({token_keys.FACT: fingerprint(derive(KEY, "s2"))}, InUse.FOREIGN),
        ({token_keys.FACT: ["a thief's", "own words"]}, InUse.UNTOLD),
    ],
)
def test_a_heartbeat_tells_which_key_a_server_has(world: World, told: dict[str, object], expected: InUse) -> None:
    world.server()
    world.set_server("s1", health=told)
    assert token_keys.in_use(seen(world), KEY) is expected


# --- DKIM -------------------------------------------------------------------------------------------------------------


def signs_with(world: World, server_id: int, key: bytes) -> str:
    """The selector that a host with this token key signs with."""
    with reading(world.engine) as connection:
        found = sending_as(connection, "shop.test", server_id, key)
    assert found is not None
    return found.signer.selector


def test_a_server_opens_its_own_dkim_keys_and_no_others(world: World) -> None:
    s1, s2 = world.server("s1"), world.server("s2")
    shop = store.add(world.engine, Names.of("shop.test"), KEY, NOW)
    common = shop.keys[0].selector
    # Without keys of its own it has only the one of all, which does not open.
    assert signs_with(world, s1.id, KEY) == common
    with pytest.raises(keys.KeyNotOpened, match="give it DKIM keys of its own with `mail-pipelines server dkim NAME`"):
        signs_with(world, s1.id, OWN)
    (made,) = rotation.equip(world.engine, world.settings, s1.id, NOW, allow_unverified=True)
    assert made.key.state is KeyState.WAITING
    (taken,) = rotation.equip(world.engine, world.settings, s1.id, NOW, allow_unverified=True)
    assert (taken.key.selector, taken.key.state) == (made.key.selector, KeyState.ACTIVE)
    assert rotation.equip(world.engine, world.settings, s1.id, NOW, allow_unverified=True) == []
    # Before it gets the key as after that.
    assert signs_with(world, s1.id, KEY) == signs_with(world, s1.id, OWN) == made.key.selector
    assert signs_with(world, s2.id, KEY) == common
    with reading(world.engine) as connection, pytest.raises(keys.KeyNotOpened):
        sending_as(connection, "shop.test", s1.id, derive(KEY, "s2"))


def test_keys_that_a_server_had_before_are_sealed_for_it(world: World) -> None:
    server = world.server()
    shop = store.add(world.engine, Names.of("shop.test"), KEY, NOW)
    private = keys.generate()
    sealed = keys.seal(private, KEY, "shop.test", "old")
    public = keys.public_text(private)
    transact(world.engine, lambda connection: store.insert_key(connection, shop.id, "old", server.id, KeyState.ACTIVE, public, sealed, NOW))
    assert signs_with(world, server.id, KEY) == "old"
    with pytest.raises(keys.KeyNotOpened):
        signs_with(world, server.id, OWN)
    for _ in range(2):
        accounts.token_key_of(world.engine, "s1", KEY)
        assert signs_with(world, server.id, KEY) == signs_with(world, server.id, OWN) == "old"
    with reading(world.engine) as connection:
        found = sending_as(connection, "shop.test", server.id, OWN)
    assert found is not None
    assert found.signer.key.private_numbers() == private.private_numbers()


@pytest.mark.parametrize("lost", [False, True])
def test_a_new_domain_has_a_key_for_each_server_with_an_account_until_that_retires(world: World, lost: bool) -> None:
    fleet = {key: world.server(key) for key in ("s1", "s2", "s3")}
    world.set_server("s1", account="mail-1")
    world.set_server("s3", account="mail-3", state="retired")
    shop = store.add(world.engine, Names.of("shop.test"), KEY, NOW)
    assert [(key.server_id, key.state) for key in shop.keys] == [(0, KeyState.ACTIVE), (fleet["s1"].id, KeyState.ACTIVE)]
    assert signs_with(world, fleet["s1"].id, OWN) == shop.keys[1].selector
    assert rotation.equip(world.engine, world.settings, fleet["s1"].id, NOW, allow_unverified=True) == []
    world.set_server("s1", state="paused")
    if lost:
        registry.retire_lost(world.engine, "s1")
    else:
        registry.retire(world.engine, "s1", 10)
    with reading(world.engine) as connection:
        left = connection.execute(sa.select(DkimKey.server_id).where(DkimKey.private_key.is_not(None))).scalars().all()
        assert store.load(connection, "shop.test").key(KeyState.ACTIVE, fleet["s1"].id) is None
    assert left == [0]


# --- what an operator is told -----------------------------------------------------------------------------------------


def findings(world: World) -> list[str]:
    with reading(world.engine) as connection:
        return [finding.problem for finding in check_server_keys(connection, world.settings)]


def problems(world: World) -> list[str]:
    """Of the campaign's From domain, whatever the DNS has: no permission lets a server sign with a key that it cannot open."""
    found = campaign_check.check(world.engine, world.settings, world.campaign_key, NOW, allow_unverified=True)
    return [problem.message for problem in found if problem.part == "content.from_address"]


def test_doctor_and_the_check_of_a_campaign_name_what_is_missing(world: World) -> None:
    server = world.server()
    store.add(world.engine, Names.of("shop.test"), KEY, NOW)
    # One host that is centre and server at once has no accounts.
    world.set_server("s1", health={token_keys.FACT: fingerprint(KEY)})
    assert (findings(world), problems(world)) == ([], [])
    world.set_server("s1", account="mail-1")
    assert findings(world) == ["who steals s1 can unsubscribe everybody: the installation's token key is there"]
    assert problems(world) == []
    world.set_server("s1", health={token_keys.FACT: fingerprint(b"another")})
    assert findings(world) == ["s1: bounces and links of its mail are not recognised, since its token key is none of this installation"]
    world.set_server("s1", health={token_keys.FACT: fingerprint(OWN)})
    assert findings(world) == ["server s1 sends nothing from shop.test: it has no DKIM key of its own there"]
    assert problems(world) == ["server s1 has no DKIM key of its own for shop.test: `mail-pipelines server dkim s1` makes it"]
    for _ in range(2):
        rotation.equip(world.engine, world.settings, server.id, NOW, allow_unverified=True)
    assert (findings(world), problems(world)) == ([], [])
    # A server that is gone lacks nothing.
    world.set_server("s1", health={token_keys.FACT: fingerprint(b"another")}, state="retired")
    assert findings(world) == []
