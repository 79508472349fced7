"""Whose lines are whose, in a log that two servers of a host share."""

from __future__ import annotations

import datetime as dt
import os
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Claim, RecoveredOffer
from mail_pipelines.dispatch import audit, registry, servers, tail
from mail_pipelines.dispatch.archive import Archive, Piece
from mail_pipelines.dispatch.claims import OpenClaim
from mail_pipelines.dispatch.exim import log
from mail_pipelines.dispatch.journal import Journal, Kind
from mail_pipelines.dispatch.own_lines import OwnLines
from mail_pipelines.dispatch.recovery import archived, steps
from mail_pipelines.dispatch.recovery import reading as recovery
from mail_pipelines.dispatch.recovery.reading import Offers
from mail_pipelines.dispatch.recovery.standing import Part
from mail_pipelines.messages.keyring import KeyRing, derive
from mail_pipelines.messages.tokens import DeliveryToken, sign_delivery
from tests.dispatch.test_recovery import part
from tests.dispatch.world import World, make_world

KEY = b"a key for tests"
STAMP = "2026-11-24 12:15:42.927 [23506]"
OURS, THEIRS, QUEUED = (sign_delivery(DeliveryToken(1, contact, 0), KEY) for contact in (1, 2, 3))
ID, QUEUED_ID = "1xVpQB-0005at-08", "1xVpQB-0005au-09"


def sent(token: str) -> list[str]:
    """The lines of a message that was delivered while it was received, but for its arrival."""
    return [
        f"INTENT {token} 23506 c{claim_of(token)}.99",
        f'{ID} >> p@x.test F=<b+{token}@bounces.test> R=given_hosts T=onward H=mx.x.test [192.0.2.1] C="250 2.0.0 Ok" QT=0.1s',
    ]


def claim_of(token: str) -> int:
    return 1 if token == OURS else 2


# Whose lines they are follows each.
LINES = [
    ("MARK c1.99 s1", "s1"),
    ("MARK c2.99 s2", "s2"),
    (sent(OURS)[0], "s1"),
    (sent(THEIRS)[0], "s2"),
    (sent(THEIRS)[1], "s2"),
    (sent(OURS)[1], "s1"),
    (f"{ID} <= b+{THEIRS}@bounces.test H=(c2.99) [127.0.0.1] P=esmtp S=319", "s2"),
    (f"H=(c2.99) [127.0.0.1] F=<b+{THEIRS}@bounces.test> temporarily rejected RCPT <p@x.test>: no permit", "s2"),
    (f"{QUEUED_ID} <= b+{QUEUED}@bounces.test H=(c2.99.google) [127.0.0.1] P=esmtp S=319", "s2"),
    (f"INTENT {QUEUED} 23507 c2.99", "s2"),
    (
        f"{QUEUED_ID} == p@x.test Q=s2.google R=r T=burst defer (-44) H=mx [192.0.2.1]: SMTP error from remote mail server after end of data: 451 4.7.1 no",
        "s2",
    ),
    # Released by the one, and claimed by the other.
    (f"INTENT {THEIRS} 23506 c1.99", "s1"),
    (sent(THEIRS)[1], "s1"),
]


@pytest.mark.parametrize("restarts", [False, True], ids=["at once", "each line by another reading"])
def test_each_line_is_of_one_server(restarts: bool) -> None:
    for server in ("s1", "s2"):
        own = OwnLines(server)
        for text, whose in LINES:
            entry = log.parse(f"{STAMP} {text}".encode())
            assert entry is not None, text
            assert own.has(entry) == (whose == server), (server, text)
            if restarts:
                own = OwnLines(server, own.claims, own.messages)


def test_where_a_server_is_alone_every_line_is_its_own() -> None:
    own = OwnLines("s1")
    lines = ["MARK c1.99", *sent(OURS), "MARK c2.99", *sent(THEIRS)]
    assert all(own.has(entry) for text in lines if (entry := log.parse(f"{STAMP} {text}".encode())) is not None)
    assert (own.claims, own.messages) == ((), ())


def test_what_is_forgotten_is_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mail_pipelines.dispatch.own_lines._CLAIMS_KEPT", 2)
    own = OwnLines("s1")
    for claim in (2, 3, 4):
        entry = log.parse(f"{STAMP} MARK c{claim}.99 s2".encode())
        assert entry is not None
        own.has(entry)
    assert own.claims == ("c3", "c4")


def written(path: Path) -> Journal:
    path.write_text("".join(f"{STAMP} {text}\n" for text, _ in LINES), encoding="ascii")
    return Journal(path, log.parse, log.continues, log.scan)


def test_a_recovery_is_told_by_each_server_what_it_has_offered(tmp_path: Path) -> None:
    journal = written(tmp_path / "main.log")
    told: dict[str, set[tuple[int, Kind]]] = {}
    for server in ("s1", "s2"):
        offers: Offers = {}
        recovery.read(server, journal, tail.blocks(journal, None, 2e9), None, KeyRing([(1, KEY)]), offers.update)
        told[server] = {(token.contact_id, outcome.kind) for token, (_, outcome) in offers.items()}
    assert told == {"s1": {(1, Kind.DELIVERED), (2, Kind.DELIVERED)}, "s2": {(2, Kind.DELIVERED), (3, Kind.DEFERRED)}}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_an_audit_goes_on_where_another_has_ended_between_the_lines_of_a_message(engine: sa.Engine, tmp_path: Path) -> None:
    world = make_world(engine, tmp_path / "home", recipients=3)
    server = world.server("s1")
    path = world.folders("s1").journal
    now = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=1)
    counted = []
    for length in (4, len(LINES)):
        # The first ends behind the INTENT of a message of the other server.
        path.write_text("".join(f"{STAMP} {text}\n" for text, _ in LINES[:length]), encoding="ascii")
        journal = Journal(path, log.parse, log.continues, log.scan)
        counted.append(audit.run(engine, world.settings, server, journal, now).outcomes)
    assert sum(counted[0].values()) == 0
    assert counted[1] == {Kind.DELIVERED: 2}


def of_one_host(engine: sa.Engine, home: Path) -> World:
    """s2 shares the log of s1."""
    world = make_world(engine, home, recipients=3, kind="exim")
    world.settings = world.settings.model_copy(update={"server": world.settings.server.model_copy(update={"exim": "s1", "log_archive": str(home / "archive")})})
    (home / "archive").mkdir(parents=True)
    for key in ("s1", "s2"):
        world.server(key)
        world.set_server(key, health={"worker": "s1"})
    return world


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_lines_from_before_a_log_was_shared_are_its_owners(engine: sa.Engine, tmp_path: Path) -> None:
    world = of_one_host(engine, tmp_path / "home")
    path = world.folders("s2").journal
    assert path == world.folders("s1").journal
    path.write_text("".join(f"{STAMP} {text}\n" for text in ("MARK c1.99", *sent(OURS))), encoding="ascii")
    os.utime(path, (1e9, 1e9))
    counted, told = {}, {}
    journal = Journal(path, log.parse, log.continues, log.scan)
    for key in ("s1", "s2"):
        servers.recall(engine, world.folders(key))
    steps.begin(engine, dt.datetime.now(dt.UTC))
    for key in ("s1", "s2"):
        with reading(engine) as connection:
            server = servers.find(connection, key)
        counted[key] = sum(audit.run(engine, world.settings, server, journal, dt.datetime.now(dt.UTC)).outcomes.values())
        recovery.take_part(engine, world.settings, server, world.sender(server), journal)
        told[key] = part(world, server).part, part(world, server).offers
    assert counted == {"s1": 1, "s2": 0}
    assert told == {"s1": (Part.READ, 1), "s2": (Part.READ, 0)}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_of_a_shared_log_in_the_archive_the_part_of_a_lost_server_is_whole(engine: sa.Engine, tmp_path: Path) -> None:
    """Messages of the other server began before the time that is asked about: one before the log was shared, and one since."""
    world = of_one_host(engine, tmp_path / "home")
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    beaten, incarnation = now - dt.timedelta(hours=1), "00000000-0000-0000-0000-000000000000"
    world.set_server("s2", heartbeat_at=beaten, incarnation=incarnation, boot_id="boot")
    keys = {key: derive(world.settings.token_key(), key) for key in ("s1", "s2")}
    early, late, own = (sign_delivery(DeliveryToken(1, number, 0), keys[key]) for number, key in ((1, "s1"), (2, "s1"), (3, "s2")))
    since = beaten - archived.OVERLAP
    archive = Archive(world.settings.server.log_archive)
    written = {
        since - dt.timedelta(minutes=2): ["MARK c1.99", sent(early)[0].replace("c2.", "c1."), "MARK c2.99 s1", sent(late)[0]],
        since + dt.timedelta(minutes=1): [sent(early)[1], sent(late)[1], "MARK c3.99 s2", sent(own)[0].replace("c2.", "c3."), sent(own)[1]],
    }
    offset = 0
    for number, (at, lines) in enumerate(written.items(), 1):
        data = "".join(f"{at:%Y-%m-%d %H:%M:%S}.000 [23506] {text}\n" for text in lines).encode()
        archive.put("s2", incarnation, Piece(number, int(at.timestamp()), 7, offset, len(data)), data)
        offset += len(data)
    archive.close("s2", incarnation, "boot")
    steps.begin(engine, now)
    assert steps.lose(engine, world.settings, "s2") == steps.Lost(0, Part.READ, 1, "from the archive")
    with reading(engine) as connection:
        assert connection.execute(sa.select(RecoveredOffer.contact_id)).scalars().all() == [3]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_server_retires_from_a_log_that_others_go_on_writing(engine: sa.Engine, tmp_path: Path) -> None:
    """The end of the log is never read; of its own lines it is enough that they are."""
    world = make_world(engine, tmp_path / "home", recipients=3)
    server = world.server("s2")
    now = dt.datetime.now(dt.UTC)
    beat: dict[str, object] = {"journal": [7, 900], "shipped": {"end": [7, 100], "at": now.timestamp(), "error": None}, "worker": "s1"}

    def left(audited_at: dt.datetime, *, shared: bool = True) -> list[str]:
        world.set_server("s2", heartbeat_at=now, health=beat if shared else {name: value for name, value in beat.items() if name != "worker"})
        with reading(engine) as connection:
            old = audit.standings(connection).get("s2", audit.Standing())
        audit._save(engine, "s2", replace(old, audited_at=audited_at), now)
        with reading(engine) as connection:
            return registry.left(connection, servers.find(connection, "s2"), 60)

    world.grant(server)
    assert isinstance(world.claim(server, limit=1), OpenClaim)
    transact(engine, lambda connection: connection.execute(sa.update(Claim).values(state="closed", closed_at=now - 2 * registry.LAST_LINES)))
    second = dt.timedelta(seconds=1)
    assert left(now - registry.LAST_LINES + second) == []
    assert "not read" in left(now - registry.LAST_LINES - second)[0]
    assert "not read" in left(now, shared=False)[0]
    beat["shipped"] = {"end": [7, 100], "at": (now - registry.LAST_LINES - second).timestamp(), "error": None}
    assert "not in the archive" in left(now)[0]
    # By the clock of a host that is a minute ahead.
    beat |= {"shipped": {"end": [7, 100], "at": (now - registry.LAST_LINES + 50 * second).timestamp(), "error": None}, "clock_ahead": 60.0}
    assert "not in the archive" in left(now)[0]
    beat["clock_ahead"] = 40.0
    assert left(now) == []
