"""Later evidence: whatever its order and however often it comes, a recipient has one state, and everything counts once."""

from __future__ import annotations

import datetime as dt
import itertools
from collections import Counter
from dataclasses import dataclass, replace

import hypothesis
import pytest
import sqlalchemy as sa
from hypothesis import strategies as st

from mail_pipelines.campaigns import progress
from mail_pipelines.contacts.addresses import parse
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import (
    Campaign,
    CampaignCounter,
    CampaignFact,
    CampaignMinute,
    Claim,
    Contact,
    ContactList,
    Delivery,
    DeliveryEvent,
    EngagementEvent,
    State,
    Subscription,
    Suppression,
)
from mail_pipelines.delivery import evidence
from mail_pipelines.delivery.counters import LATE_BOUNCE
from mail_pipelines.delivery.events import event_id
from mail_pipelines.delivery.evidence import Effect, Evidence, Kind, Known
from mail_pipelines.delivery.ledger_archive import LedgerArchive
from mail_pipelines.delivery.recording import ClaimRef, Result, record
from mail_pipelines.delivery.transitions import may_move
from tests.campaigns.parts import NOW, counters_equal_ledger, fill_ledger, ledger_states, make_campaign

LATER = NOW + dt.timedelta(hours=2)


def piece(kind: Kind, contact_id: int = 1, attempt: int = 0, **words: object) -> Evidence:
    campaign_id = int(str(words.pop("campaign_id", 1)))
    refusal = {"code": 550, "enhanced": "5.1.1", "text": "550 5.1.1 <x@example.net> user unknown"} if kind in evidence.FAILED else {}
    return Evidence(kind, campaign_id, contact_id, attempt, LATER, **(refusal | words))  # type: ignore[arg-type]


def apply(engine: sa.Engine, *pieces: Evidence, now: dt.datetime = LATER) -> list[Effect]:
    return transact(engine, lambda connection: evidence.apply(connection, pieces, now, LedgerArchive("")))


def facts(engine: sa.Engine) -> dict[str, int]:
    with reading(engine) as connection:
        return progress.facts(connection, 1)


def rows(engine: sa.Engine, table: type[DeliveryEvent] | type[EngagementEvent]) -> Counter[tuple[int, str]]:
    with reading(engine) as connection:
        return Counter((row.contact_id, row.kind) for row in connection.execute(sa.select(table.contact_id, table.kind)))


def suppressed(engine: sa.Engine) -> set[tuple[bytes, str, int, str]]:
    with reading(engine) as connection:
        found = connection.execute(sa.select(Suppression.address_hash, Suppression.scope_kind, Suppression.scope_id, Suppression.reason))
        return {(bytes(row.address_hash), row.scope_kind, row.scope_id, row.reason) for row in found}


def hash_of(contact_id: int) -> bytes:
    return contact_id.to_bytes(16, "big")


@dataclass
class Ledger:
    """Campaign 1, which is sending."""

    engine: sa.Engine

    def fill(self, *states: State, attempt: int = 0) -> None:
        """Recipients 1, 2 … in the given states, in the order of the states' numbers; refused ones with the answer that refused them."""
        assert list(states) == sorted(states)
        fill_ledger(self.engine, 1, dict(Counter(states)), sort_key=int(NOW.timestamp()))
        shared = {"month": 202603, "occurred_at": NOW, "campaign_id": 1, "attempt": attempt, "kind": "bounced"}
        refused = [number for number, state in enumerate(states, 1) if state is State.BOUNCED]
        events = [shared | {"id": event_id(1, number, attempt, "bounced"), "contact_id": number} for number in refused]

        def work(connection: sa.Connection) -> None:
            connection.execute(sa.update(Delivery).values(attempt=attempt))
            if events:
                connection.execute(sa.insert(DeliveryEvent), events)

        transact(self.engine, work)

    def empty(self) -> None:
        tables = (Delivery, DeliveryEvent, EngagementEvent, CampaignCounter, CampaignFact, CampaignMinute, Claim, Suppression)

        def work(connection: sa.Connection) -> None:
            for table in tables:
                connection.execute(sa.delete(table))

        transact(self.engine, work)


@pytest.fixture
def ledger(engine: sa.Engine) -> Ledger:
    make_campaign(engine, state="sending")
    return Ledger(engine)


# --- one kind after the other -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        (Kind.BOUNCE_REPORT, State.BOUNCED),
        (Kind.LATE_REFUSAL, State.BOUNCED),
        (Kind.LATE_DELIVERY, State.DELIVERED),
        (Kind.DELIVERY_REPORT, State.DELIVERED),
        (Kind.COMPLAINT, State.DELIVERED),
        (Kind.UNSUBSCRIBE, State.DELIVERED),
    ],
)
def test_evidence_resolves_what_nobody_knew(ledger: Ledger, kind: Kind, state: State) -> None:
    ledger.fill(State.UNKNOWN, State.UNKNOWN)
    assert apply(ledger.engine, piece(kind)) == [Effect.NEW]
    assert ledger_states(ledger.engine, 1) == Counter([state, State.UNKNOWN])
    assert counters_equal_ledger(ledger.engine, 1)
    assert facts(ledger.engine) == ({kind.value: 1} if kind.is_request else {})


def test_a_message_to_be_sent_again_is_not_if_its_first_copy_shows(ledger: Ledger) -> None:
    ledger.fill(State.PENDING, State.PENDING, State.PENDING)
    apply(ledger.engine, piece(Kind.UNSUBSCRIBE, 1), piece(Kind.BOUNCE_REPORT, 2))
    assert ledger_states(ledger.engine, 1) == Counter([State.PENDING, State.DELIVERED, State.BOUNCED])
    assert counters_equal_ledger(ledger.engine, 1)


def test_a_late_bounce_is_a_fact_beside_the_state(ledger: Ledger) -> None:
    ledger.fill(State.DELIVERED)
    assert apply(ledger.engine, piece(Kind.BOUNCE_REPORT)) == [Effect.NEW]
    assert apply(ledger.engine, piece(Kind.BOUNCE_REPORT, text="another mail")) == [Effect.KNOWN]
    assert ledger_states(ledger.engine, 1) == {State.DELIVERED: 1}
    assert facts(ledger.engine) == {LATE_BOUNCE: 1}
    assert rows(ledger.engine, DeliveryEvent) == {(1, "bounce_report"): 1}
    assert suppressed(ledger.engine) == {(hash_of(1), "all", 0, "bounce")}


def test_the_report_of_a_bounce_that_smtp_told_already_counts_nothing(ledger: Ledger) -> None:
    ledger.fill(State.BOUNCED)
    apply(ledger.engine, piece(Kind.BOUNCE_REPORT), piece(Kind.COMPLAINT))
    assert ledger_states(ledger.engine, 1) == {State.BOUNCED: 1}
    assert facts(ledger.engine) == {"complained": 1}


def test_evidence_of_an_older_attempt_changes_nothing_newer(ledger: Ledger) -> None:
    ledger.fill(State.DEFERRED, State.UNKNOWN, State.DELIVERED, attempt=2)
    pieces = [piece(Kind.BOUNCE_REPORT, number, attempt) for number in (1, 2, 3) for attempt in (0, 1)]
    assert apply(ledger.engine, *pieces) == [Effect.OLDER] * 6
    assert ledger_states(ledger.engine, 1) == Counter([State.DEFERRED, State.UNKNOWN, State.DELIVERED])
    assert (facts(ledger.engine), suppressed(ledger.engine)) == ({}, set())
    assert sum(rows(ledger.engine, DeliveryEvent).values()) == 6


def test_what_a_server_has_in_hand_is_its_own_and_evidence_waits(ledger: Ledger) -> None:
    ledger.fill(State.CLAIMED, State.CLAIMED)
    pieces = [piece(Kind.BOUNCE_REPORT, 1), piece(Kind.COMPLAINT, 2)]
    assert apply(ledger.engine, *pieces) == [Effect.TOO_EARLY] * 2
    assert ledger_states(ledger.engine, 1) == {State.CLAIMED: 2}
    # But a person's wish does not.
    assert suppressed(ledger.engine) == {(hash_of(2), "brand", 1, "complaint")}
    transact(ledger.engine, lambda connection: connection.execute(sa.update(Delivery).values(state=int(State.UNKNOWN))))
    assert apply(ledger.engine, *pieces) == [Effect.NEW, Effect.KNOWN]
    assert ledger_states(ledger.engine, 1) == Counter([State.BOUNCED, State.DELIVERED])
    assert facts(ledger.engine) == {"complained": 1}


def test_a_bounce_quicker_than_the_log_counts_when_the_log_has_been_read(ledger: Ledger) -> None:
    ledger.fill(State.CLAIMED)
    claim(ledger.engine, 1)
    assert apply(ledger.engine, piece(Kind.BOUNCE_REPORT, attempt=0)) == [Effect.TOO_EARLY]
    read_log(ledger.engine, LogLine(1, State.DELIVERED))
    assert apply(ledger.engine, piece(Kind.BOUNCE_REPORT, attempt=0)) == [Effect.NEW]
    assert (ledger_states(ledger.engine, 1), facts(ledger.engine)) == ({State.DELIVERED: 1}, {LATE_BOUNCE: 1})


def test_what_the_ledger_does_not_know_is_left(ledger: Ledger) -> None:
    ledger.fill(State.UNKNOWN)
    pieces = [piece(Kind.BOUNCE_REPORT, 99), piece(Kind.BOUNCE_REPORT, 1, attempt=1), piece(Kind.COMPLAINT, campaign_id=77)]
    assert apply(ledger.engine, *pieces) == [Effect.UNMATCHED] * 3
    assert rows(ledger.engine, DeliveryEvent) == {}
    assert ledger_states(ledger.engine, 1) == {State.UNKNOWN: 1}


def test_final_states_without_an_answer_stay(ledger: Ledger) -> None:
    states = (State.SUPPRESSED, State.EXPIRED, State.CANCELLED, State.UNRESOLVED)
    ledger.fill(*states)
    apply(ledger.engine, *(piece(kind, number) for kind in Kind for number in (1, 2, 3, 4)))
    assert ledger_states(ledger.engine, 1) == Counter(states)


# --- what follows for people ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scope", "scope_id"), [("all", 0), ("brand", 1), ("list", 1)])
def test_unsubscribing_by_mail_ends_what_the_campaign_says(ledger: Ledger, scope: str, scope_id: int) -> None:
    ledger.fill(State.DELIVERED, State.DELIVERED)
    address = parse("someone@example.net")

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.insert(ContactList), [{"id": number, "key": f"l{number}", "name": "l", "brand_id": 1, "created_at": NOW} for number in (1, 2)])
        connection.execute(
            sa.insert(Contact).values(
                id=1,
                email=address.email,
                address=address.address,
                address_hash=address.hash,
                domain=address.domain,
                provider="other",
                attributes={},
                created_at=NOW,
                updated_at=NOW,
            )
        )
        connection.execute(
            sa.insert(Subscription), [{"contact_id": 1, "list_id": number, "subscribed": True, "source": "x", "changed_at": NOW} for number in (1, 2)]
        )
        connection.execute(sa.update(Campaign).values(unsubscribe=scope, unsubscribe_list_id=1 if scope == "list" else None))

    transact(ledger.engine, work)
    apply(ledger.engine, piece(Kind.UNSUBSCRIBE))
    with reading(ledger.engine) as connection:
        left = set(connection.execute(sa.select(Subscription.list_id).where(Subscription.subscribed)).scalars())
    assert left == ({2} if scope == "list" else set())
    # The address of today, and the one that was mailed.
    assert suppressed(ledger.engine) == {(hash_, scope, scope_id, "unsubscribe") for hash_ in (address.hash, hash_of(1))}
    assert rows(ledger.engine, EngagementEvent) == {(1, "unsubscribe"): 1}


def test_a_wish_is_granted_again_after_a_new_subscription_and_counts_once(ledger: Ledger) -> None:
    ledger.fill(State.DELIVERED)
    apply(ledger.engine, piece(Kind.COMPLAINT))
    transact(ledger.engine, lambda connection: connection.execute(sa.delete(Suppression)))
    assert apply(ledger.engine, piece(Kind.COMPLAINT), now=LATER + dt.timedelta(days=40)) == [Effect.KNOWN]
    assert suppressed(ledger.engine) == {(hash_of(1), "brand", 1, "complaint")}
    assert (facts(ledger.engine), rows(ledger.engine, EngagementEvent)) == ({"complained": 1}, {(1, "complaint"): 1})


@pytest.mark.parametrize(
    ("words", "is_suppressed"),
    [
        ({}, True),
        ({"code": 552, "enhanced": "5.2.2", "text": "mailbox full"}, False),
        ({"code": 550, "enhanced": "5.7.1", "text": "blocked by policy"}, False),
        ({"code": 554, "enhanced": "5.6.0", "text": "spam"}, False),
        ({"code": None, "enhanced": "4.4.7", "text": "retry timeout exceeded"}, False),
        ({"code": 550, "enhanced": "5.1.2", "text": "bad domain"}, False),
        ({"code": None, "enhanced": None, "text": ""}, False),
    ],
)
def test_only_a_bad_address_is_suppressed_at_once(ledger: Ledger, words: dict[str, object], is_suppressed: bool) -> None:
    ledger.fill(State.DELIVERED)
    apply(ledger.engine, piece(Kind.BOUNCE_REPORT, **words))
    assert bool(suppressed(ledger.engine)) == is_suppressed


def test_addresses_in_the_words_are_masked(ledger: Ledger) -> None:
    ledger.fill(State.DELIVERED)
    apply(ledger.engine, piece(Kind.BOUNCE_REPORT))
    with reading(ledger.engine) as connection:
        assert connection.execute(sa.select(DeliveryEvent.text)).scalar_one() == "550 5.1.1 <***@example.net> user unknown"


# --- any order, any repetition --------------------------------------------------------------------------------------

CONTACTS = 3
ATTEMPT = 1
# The more often, the more can go wrong.
BASES = st.sampled_from([*[State.CLAIMED] * 3, State.UNKNOWN, State.DELIVERED, State.PENDING, State.DEFERRED, State.BOUNCED, State.UNRESOLVED])
ANSWERS = st.sampled_from([State.DELIVERED, State.BOUNCED, State.DEFERRED, State.UNKNOWN])
PIECES = st.builds(piece, st.sampled_from(Kind), st.integers(1, CONTACTS), st.sampled_from([ATTEMPT, ATTEMPT, ATTEMPT - 1]))


@dataclass(frozen=True)
class LogLine:
    """The server has read its log: the outcome of a claimed row is recorded."""

    contact_id: int
    state: State


def claim(engine: sa.Engine, contact_id: int) -> None:
    """A claim of one row."""
    values = {"id": contact_id, "campaign_id": 1, "server_id": 3, "run_id": "r", "size": 1, "state": "open", "incarnation": "i", "boot_id": "b"}
    values |= {"journal_inode": 0, "journal_offset": 0, "opened_at": NOW, "lease_until": LATER}
    ours = (Delivery.campaign_id == 1, Delivery.contact_id == contact_id)

    def work(connection: sa.Connection) -> None:
        shard, provider = connection.execute(sa.select(Delivery.shard, Delivery.provider).where(*ours)).one()
        connection.execute(sa.insert(Claim).values(**values, shard=shard, provider=provider))
        connection.execute(sa.update(Delivery).where(*ours).values(claim_id=contact_id))

    transact(engine, work)


def read_log(engine: sa.Engine, line: LogLine) -> None:
    words = {State.BOUNCED: {"code": 550, "reason": "invalid_recipient"}, State.DEFERRED: {"code": 450, "reason": "transient", "due": 5}}
    result = Result(line.contact_id, ATTEMPT, line.state, **words.get(line.state, {}))  # type: ignore[arg-type]

    def work(connection: sa.Connection) -> None:
        row = connection.execute(sa.select(Claim.shard, Claim.provider).where(Claim.id == line.contact_id)).one()
        record(connection, ClaimRef(line.contact_id, 1, row.shard, row.provider, 3, NOW), [result], claim_state="open")

    transact(engine, work)


def oracle(answer: State, kinds: set[tuple[int, Kind]]) -> tuple[State, set[str]]:
    """The end of one recipient in the words of the promise: from what SMTP answered, and from the set of what came."""
    own = {kind for attempt, kind in kinds if attempt == (ATTEMPT + 1 if answer is State.DEFERRED else ATTEMPT)}
    state = answer
    if answer in (State.PENDING, State.UNKNOWN):
        if own & {Kind.LATE_DELIVERY, Kind.DELIVERY_REPORT, Kind.COMPLAINT, Kind.UNSUBSCRIBE}:
            state = State.DELIVERED
        elif own:
            state = State.BOUNCED
    counted = {kind.value for _, kind in kinds if kind in (Kind.COMPLAINT, Kind.UNSUBSCRIBE)}
    return state, counted | ({"late_bounce"} if state is State.DELIVERED and Kind.BOUNCE_REPORT in own else set())


@pytest.mark.slow
@hypothesis.settings(max_examples=50, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow])
@hypothesis.given(data=st.data(), bases=st.lists(BASES, min_size=CONTACTS, max_size=CONTACTS).map(sorted), pieces=st.lists(PIECES, min_size=1, max_size=14))
def test_any_order_and_any_repetition_end_in_the_same_state(ledger: Ledger, data: st.DataObject, bases: list[State], pieces: list[Evidence]) -> None:
    """Log lines, notifications, late bounces, complaints, unsubscribing, of two attempts. What comes too early is read again, as from a maildir."""
    lines = [LogLine(number, data.draw(ANSWERS)) for number, base in enumerate(bases, 1) if base is State.CLAIMED]
    repeated = pieces + data.draw(st.lists(st.sampled_from(pieces), max_size=6))
    order: list[Evidence | LogLine] = data.draw(st.permutations([*repeated, *lines]))
    cuts = data.draw(st.sets(st.integers(0, len(order)), min_size=1, max_size=4)) | {0, len(order)}
    ledger.empty()
    # Rows that wait for their second attempt after a deferral are at a later one.
    ledger.fill(*bases, attempt=ATTEMPT)
    deferred = [number for number, base in enumerate(bases, 1) if base is State.DEFERRED]
    transact(ledger.engine, lambda connection: connection.execute(sa.update(Delivery).where(Delivery.contact_id.in_(deferred)).values(attempt=ATTEMPT + 1)))
    for line in lines:
        claim(ledger.engine, line.contact_id)
    waiting: list[Evidence] = []
    for begin, end in itertools.pairwise(sorted(cuts)):
        for line in order[begin:end]:
            if isinstance(line, LogLine):
                read_log(ledger.engine, line)
        batch = waiting + [one for one in order[begin:end] if isinstance(one, Evidence)]
        effects = apply(ledger.engine, *batch)
        waiting = [one for one, effect in zip(batch, effects, strict=True) if effect is Effect.TOO_EARLY]
    assert waiting == []
    answers = dict(enumerate(bases, 1)) | {line.contact_id: line.state for line in lines}
    check(ledger.engine, answers, pieces)


def check(engine: sa.Engine, answers: dict[int, State], pieces: list[Evidence]) -> None:
    expected_states: Counter[State] = Counter()
    expected_facts: Counter[str] = Counter()
    for number, answer in answers.items():
        state, counted = oracle(answer, {(one.attempt, one.kind) for one in pieces if one.contact_id == number})
        expected_states[state] += 1
        expected_facts.update(counted)
    assert ledger_states(engine, 1) == expected_states
    assert facts(engine) == expected_facts
    assert counters_equal_ledger(engine, 1)
    with reading(engine) as connection:
        events = connection.execute(sa.select(sa.func.count()).where(DeliveryEvent.kind.in_(list(Kind)))).scalar_one()
        minutes = sa.select(CampaignMinute.state, sa.func.sum(CampaignMinute.count)).where(CampaignMinute.state >= int(State.DELIVERED))
        outcomes = {State(state): int(count) for state, count in connection.execute(minutes.group_by(CampaignMinute.state)) if count}
    assert events == len({(one.contact_id, one.attempt, one.kind) for one in pieces})
    assert outcomes == {state: count for state, count in expected_states.items() if state.is_final}


# --- the state machine itself ---------------------------------------------------------------------------------------


def test_the_machine_only_makes_moves_of_the_table_and_comes_to_rest() -> None:
    """For every state and every set of kinds: the state that follows is reachable, and adding what is known already changes nothing."""
    for state, answered in itertools.product(State, (False, True)):
        for count in range(4):
            for kinds in itertools.combinations(Kind, count):
                row = Known(state, 0, answered, frozenset((0, kind) for kind in kinds))
                after = evidence.settled(row)
                assert after is state or may_move(state, after)
                assert evidence.settled(replace(row, state=after)) is after
