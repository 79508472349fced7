"""A server is stolen, with its token key: what a thief signs with it counts about that server's own recipients, and about nobody else."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.campaigns import unknown
from mail_pipelines.campaigns.unknown import Verdict
from mail_pipelines.config import Settings
from mail_pipelines.contacts.addresses import parse
from mail_pipelines.database.engine import reading as reading_of
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Delivery, DeliveryEvent, EngagementEvent, State, Suppression
from mail_pipelines.delivery.recording import Result, record
from mail_pipelines.dispatch import accounts, servers
from mail_pipelines.dispatch.claims import OpenClaim
from mail_pipelines.dispatch.recovery import standing, steps
from mail_pipelines.dispatch.recovery.standing import Part
from mail_pipelines.inbound import reading
from mail_pipelines.inbound.folders import InboundFolders
from mail_pipelines.messages.keyring import derive
from tests.dispatch.world import World, make_world
from tests.inbound import mails
from tests.inbound.mails import complaint, dsn, request
from tests.inbound.test_reading import add

NOW = dt.datetime.now(dt.UTC)
REPORTS: tuple[Callable[[str], bytes], ...] = (dsn, complaint, request)


@dataclass
class Theft:
    """s1 is stolen, of s1 and s2. Each has mailed recipients of google: one message is unknown, one deferred, three are delivered."""

    world: World
    stolen: servers.ServerInfo
    other: servers.ServerInfo
    own: list[int]
    others: list[int]
    reads: int = 0

    @property
    def settings(self) -> Settings:
        return self.world.settings

    def token(self, contact_id: int, key: bytes | None = None) -> str:
        """Signed with the stolen key, or another one."""
        return mails.token(contact_id, key=(key or derive(self.settings.token_key(), "s1")).decode())

    def read(self, *messages: bytes) -> dict[str, int]:
        self.reads += 1
        add(InboundFolders.of(self.settings.inbound).mail, "bounces", *messages, at=NOW - dt.timedelta(minutes=10 - self.reads))
        return reading.read(self.world.engine, self.settings, NOW).numbers()

    def follows(self) -> tuple[Counter[State], int, set[str]]:
        """Everything that reports about recipients can change: states, evidence, and who is suppressed."""
        with reading_of(self.world.engine) as connection:
            evidence = sum(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() for table in (DeliveryEvent, EngagementEvent))
            hashes = {bytes(row) for row in connection.execute(sa.select(Suppression.address_hash)).scalars()}
        return self.world.states(), evidence, {address for address in map(self.address, range(1, 42)) if parse(address).hash in hashes}

    @staticmethod
    def address(contact_id: int) -> str:
        return f"person{contact_id}@google.test"


@pytest.fixture
def theft(engine: sa.Engine, tmp_path: Path) -> Theft:
    world = make_world(engine, tmp_path / "home", recipients=40, domains=("google.test",))
    fleet = [world.server(key) for key in ("s1", "s2")]
    mailed = []
    for server in fleet:
        world.grant(server, 20)
        claim = world.claim(server, limit=5)
        assert isinstance(claim, OpenClaim)
        numbers = [row.contact_id for row in claim.rows]
        unknown, deferred, *delivered = numbers
        due = int(NOW.timestamp()) + 3600
        results = [Result(unknown, 0, State.UNKNOWN, reason="no_outcome"), Result(deferred, 0, State.DEFERRED, 451, "4.3.0", "transient", due=due)]
        results += [Result(number, 0, State.DELIVERED, 250) for number in delivered]
        transact(engine, lambda connection, ref=claim.ref, results=results: record(connection, ref, results, claim_state="open"))  # type: ignore[misc]
        mailed.append(numbers)
    return Theft(world, fleet[0], fleet[1], *mailed)


def waiting(theft: Theft) -> list[int]:
    """Recipients whom nobody has mailed."""
    with reading_of(theft.world.engine) as connection:
        return list(connection.execute(sa.select(Delivery.contact_id).where(Delivery.state == int(State.PENDING)).limit(3)).scalars())


@pytest.mark.parametrize("revoked", [False, True])
def test_what_is_forged_of_others_is_ignored_and_counted_and_its_own_is_taken(theft: Theft, revoked: bool) -> None:
    if revoked:
        accounts.revoke(theft.world.engine, "s1", NOW)
    before = theft.follows()
    # Of another server, of nobody yet, and of a recipient that there is not.
    victims = [*theft.others, *waiting(theft), 41]
    forged = [report(theft.token(victim)) for victim in victims for report in REPORTS]
    assert theft.read(*forged) == {"forged": len(forged)}
    assert theft.follows() == before
    unknown, deferred, delivered, *_ = theft.own
    assert theft.read(dsn(theft.token(unknown)), complaint(theft.token(delivered)), request(theft.token(deferred))) == {
        "bounce_report": 1,
        "complained": 1,
        "older": 1,
    }
    states, _, suppressed = theft.follows()
    assert suppressed == {theft.address(number) for number in (unknown, delivered, deferred)}
    assert states[State.BOUNCED] == before[0][State.BOUNCED] + 1
    theft.world.check_counters()


def test_a_key_of_no_registered_server_is_foreign_and_the_installations_is_good_for_all(theft: Theft) -> None:
    """Mail from before servers had keys is under the installation's."""
    before = theft.follows()
    invented = derive(theft.settings.token_key(), "s3")
    assert theft.read(*(report(theft.token(theft.others[2], invented)) for report in REPORTS)) == {"ignored_foreign_token": 3}
    assert theft.follows() == before
    central = theft.settings.token_key()
    assert theft.read(request(theft.token(theft.others[2], central)), request(theft.token(theft.own[2], central))) == {"unsubscribed": 2}


def test_a_server_may_report_on_what_another_one_has_sent_since(theft: Theft) -> None:
    """The deferred recipient of the stolen server is mailed by the other one: both copies have links that work, of those of others none does."""
    deferred = theft.own[1]
    is_due = sa.update(Delivery).where(Delivery.contact_id == deferred).values(sort_key=1)
    transact(theft.world.engine, lambda connection: connection.execute(is_due))
    claim = theft.world.claim(theft.other, limit=1)
    assert isinstance(claim, OpenClaim)
    assert [(row.contact_id, row.attempt) for row in claim.rows] == [(deferred, 1)]
    outcome = [Result(deferred, 1, State.DELIVERED, 250)]
    transact(theft.world.engine, lambda connection: record(connection, claim.ref, outcome, claim_state="open"))
    assert theft.read(request(theft.token(deferred))) == {"older": 1}
    assert theft.follows()[2] == {theft.address(deferred)}


def test_what_a_recovery_left_in_doubt_the_lost_server_may_have_mailed(engine: sa.Engine, tmp_path: Path) -> None:
    """The backup is older than its mail, so that nothing in the ledger names it; s2 has contributed its log, and may say nothing of these rows."""
    world = make_world(engine, tmp_path / "home", recipients=40, domains=("google.test",))
    fleet = [world.server(key) for key in ("s1", "s2")]
    recovery = steps.begin(engine, NOW)
    steps.lose(engine, world.settings, "s1")
    transact(engine, lambda connection: standing.set_part(connection, recovery.generation, fleet[1].id, Part.READ))
    assert steps.finish(engine, world.settings, NOW).doubtful == 40
    lost = Theft(world, fleet[0], fleet[1], [], [])
    other = derive(world.settings.token_key(), "s2")
    assert lost.read(*(report(lost.token(number, other)) for number, report in enumerate(REPORTS, 1))) == {"forged": 3}
    for number, (verdict, confirmed) in enumerate([(Verdict.RESEND, True), (Verdict.DELIVERED, False), (Verdict.UNRESOLVED, False)], 4):
        scope = unknown.Scope(world.campaign_id, contact_id=number)
        assert unknown.decide(engine, scope, verdict, NOW, who="tester", why="a test", confirmed=confirmed) == 1
    assert lost.read(dsn(lost.token(1)), complaint(lost.token(2)), *(request(lost.token(number)) for number in (3, 4, 5, 6))) == {
        "bounce_report": 1,
        "complained": 1,
        "unsubscribed": 4,
    }
    # The doubt about them is over, and they are still its recipients.
    assert lost.read(request(lost.token(1)), request(lost.token(2))) == {"unsubscribed": 2}
    states, _, suppressed = lost.follows()
    # That somebody asks to be unsubscribed says that even the message that bounced had come.
    assert states == Counter({State.UNKNOWN: 34, State.DELIVERED: 5, State.UNRESOLVED: 1})
    assert suppressed == {lost.address(number) for number in range(1, 7)}
    world.check_counters()


def test_while_the_archive_is_away_nobody_is_unsubscribed_by_a_servers_key(theft: Theft) -> None:
    """Whose recipient it is cannot be told then. What people ask for under the installation's key is done at once, as ever."""
    recorded = {"name": "away.parquet", "rows": 1, "sha256": "", "first": 1, "last": 40}
    theft.world.set_campaign(state="archived", archive={"deliveries": [recorded], "delivery_events": [], "claims": []})
    victim, own = theft.others[2], theft.own[2]
    transact(theft.world.engine, lambda connection: connection.execute(sa.delete(Delivery).where(Delivery.contact_id.in_([victim, own]))))
    assert theft.read(request(theft.token(victim)), request(theft.token(own))) == {"archive_away": 2}
    assert _wanted(theft.world.engine, victim, own) == {victim, own}
    assert theft.read(request(theft.token(own, theft.settings.token_key()))) == {"archive_away": 3}
    assert _wanted(theft.world.engine, victim, own) == {victim}


def _wanted(engine: sa.Engine, *contact_ids: int) -> set[int]:
    """Who of these is not suppressed."""
    with reading_of(engine) as connection:
        hashes = {bytes(row) for row in connection.execute(sa.select(Suppression.address_hash)).scalars()}
    return {number for number in contact_ids if parse(Theft.address(number)).hash not in hashes}
