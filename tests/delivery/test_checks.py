"""Each check passes on what it promises and fails on the smallest breach of it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import pytest
import sqlalchemy as sa

from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.contacts import consent
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import CampaignCounter, Contact, ContactList, Delivery, State
from mail_pipelines.delivery import checks
from mail_pipelines.delivery.checks import Finding, Severity
from tests.campaigns.parts import make_campaign
from tests.delivery.results import SHARDS, START, Outcome, add_claims, make_results, set_campaign, some_outcomes

RECIPIENTS = 300
CHECK = {check.name: check.find for check in checks.CHECKS}


def find(engine: sa.Engine, campaign: Campaign, name: str) -> Finding:
    with reading(engine) as connection:
        return CHECK[name](connection, campaign)


def execute(engine: sa.Engine, statement: sa.Executable) -> None:
    transact(engine, lambda connection: connection.execute(statement))


def results(engine: sa.Engine, **options: dict[str, int]) -> Campaign:
    return make_results(engine, RECIPIENTS, some_outcomes(RECIPIENTS), **options)


def test_a_campaign_as_promised_passes(engine: sa.Engine) -> None:
    campaign = results(engine, excluded={"unsubscribe": 4})
    assert [name for name in CHECK if not find(engine, campaign, name).passed] == []


def test_a_campaign_never_frozen_passes(engine: sa.Engine) -> None:
    campaign = make_campaign(engine)
    assert [name for name in CHECK if not find(engine, campaign, name).passed] == []


# --- sums ---


def test_sums_that_differ_by_one_fail(engine: sa.Engine) -> None:
    campaign = results(engine)
    for matched, audience, excluded in ((RECIPIENTS + 1, RECIPIENTS, 0), (RECIPIENTS, RECIPIENTS, 1), (RECIPIENTS + 1, RECIPIENTS + 1, 0)):
        campaign = set_campaign(engine, campaign, audience_counts={"matched": matched, "audience": audience, "excluded": {"missing": excluded}})
        assert not find(engine, campaign, "sums_hold").passed


def test_a_part_below_zero_fails_even_if_the_sum_is_right(engine: sa.Engine) -> None:
    campaign = results(engine)
    for state, delta in ((State.CANCELLED, -1), (State.UNKNOWN, 1)):
        values = {"campaign_id": campaign.id, "shard": 0, "provider": "other", "server_id": 0, "state": int(state), "count": delta}
        execute(engine, sa.insert(CampaignCounter).values(values))
    found = find(engine, campaign, "sums_hold")
    assert found.numbers["parts"] == found.numbers["audience"]
    assert not found.passed


def test_an_audience_may_be_incomplete_only_while_it_is_loaded(engine: sa.Engine) -> None:
    counts = {"matched": RECIPIENTS + 50, "audience": RECIPIENTS + 50, "excluded": {}}
    campaign = results(engine)
    for state, passes in ((CampaignState.BUILDING, True), (CampaignState.SENDING, False)):
        campaign = set_campaign(engine, campaign, audience_counts=counts, state=state.value)
        assert find(engine, campaign, "sums_hold").passed is passes
        assert find(engine, campaign, "one_state_per_row").passed is passes


# --- the ledger ---


def test_a_row_lost_from_the_ledger_fails(engine: sa.Engine) -> None:
    campaign = results(engine)
    execute(engine, sa.delete(Delivery).where(Delivery.contact_id == 17))
    found = find(engine, campaign, "one_state_per_row")
    assert not found.passed
    assert found.numbers == {"rows": RECIPIENTS - 1, "audience": RECIPIENTS, "differing": 1}


def test_a_row_moved_by_hand_fails(engine: sa.Engine) -> None:
    campaign = results(engine)
    execute(engine, sa.update(Delivery).where(Delivery.contact_id == 17).values(state=int(State.CANCELLED)))
    found = find(engine, campaign, "one_state_per_row")
    assert not found.passed
    assert found.numbers == {"rows": RECIPIENTS, "audience": RECIPIENTS, "differing": 2}


def test_a_second_row_of_an_address_or_a_contact_fails(engine: sa.Engine) -> None:
    """The database's own keys forbid both, so the table is replaced by a copy without keys: as a bad restore might leave it."""
    campaign = results(engine)

    def damage(connection: sa.Connection) -> None:
        connection.exec_driver_sql("ALTER TABLE deliveries RENAME TO deliveries_with_keys")
        connection.exec_driver_sql("CREATE TABLE deliveries AS SELECT * FROM deliveries_with_keys")
        row = dict(connection.execute(sa.select(Delivery.__table__).where(Delivery.contact_id == 17)).mappings().one())
        connection.execute(sa.insert(Delivery), [row | {"contact_id": RECIPIENTS + 1}, row | {"contact_id": RECIPIENTS + 2}])
        connection.execute(sa.insert(Delivery), [row | {"contact_id": 18, "address_hash": bytes(16)}])

    transact(engine, damage)
    found = find(engine, campaign, "none_twice")
    assert not found.passed
    assert found.numbers == {"second_rows_of_an_address": 2, "second_rows_of_a_contact": 1}


# --- consent ---


def delivered(engine: sa.Engine, campaign: Campaign, count: int) -> Sequence[sa.Row[tuple[int, bytes, int]]]:
    """Some delivered rows: contact_id, address_hash, sort_key (the second of the delivery)."""
    query = sa.select(Delivery.contact_id, Delivery.address_hash, Delivery.sort_key)
    with reading(engine) as connection:
        return connection.execute(query.where(Delivery.campaign_id == campaign.id, Delivery.state == int(State.DELIVERED)).limit(count)).all()


def suppress(engine: sa.Engine, address_hash: bytes, at: dt.datetime, kind: consent.ScopeKind = "all", scope_id: int = 0) -> None:
    transact(engine, lambda connection: consent.suppress(connection, [address_hash], reason="unsubscribe", scope_kind=kind, scope_id=scope_id, now=at))


def second(number: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(number, dt.UTC)


def test_an_address_suppressed_before_its_delivery_fails(engine: sa.Engine) -> None:
    campaign = results(engine)
    seconds_and_breaches = ((3600, 0), (1, 0), (0.5, 0), (0, 0), (-0.5, 1), (-3600, 2))
    for row, (seconds, breaches) in zip(delivered(engine, campaign, len(seconds_and_breaches)), seconds_and_breaches, strict=True):
        suppress(engine, row.address_hash, second(row.sort_key + seconds))
        found = find(engine, campaign, "none_suppressed_delivered")
        assert found.numbers == {"suppressed_addresses": breaches, "suppressed_domains": 0}
        assert found.passed is (breaches == 0)
        assert found.severity is Severity.ERROR


def test_a_suppression_while_the_message_is_under_way_is_no_breach(engine: sa.Engine) -> None:
    """Consent is decided by the claim; the answer of the destination may come much later."""
    campaign = results(engine)
    rows = delivered(engine, campaign, 2)
    opened = [row.sort_key - 90 for row in rows]
    claims = add_claims(engine, campaign.id, [(1, moment - START.timestamp(), moment - START.timestamp() + 90) for moment in opened])
    for row, claim_id in zip(rows, claims, strict=True):
        execute(engine, sa.update(Delivery).where(Delivery.contact_id == row.contact_id).values(claim_id=claim_id))
    suppress(engine, rows[0].address_hash, second(opened[0] + 0.25))
    assert find(engine, campaign, "none_suppressed_delivered").passed
    suppress(engine, rows[1].address_hash, second(opened[1] - 0.25))
    assert find(engine, campaign, "none_suppressed_delivered").numbers["suppressed_addresses"] == 1


def test_only_scopes_of_the_campaign_count(engine: sa.Engine) -> None:
    lists = [{"id": number, "key": f"list-{number}", "name": "L", "brand_id": 1, "created_at": START} for number in (1, 2)]
    execute(engine, sa.insert(ContactList).values(lists))
    campaign = set_campaign(engine, results(engine), unsubscribe="list", unsubscribe_list_id=1)
    (row,) = delivered(engine, campaign, 1)
    before = second(row.sort_key - 60)
    scopes: list[tuple[consent.ScopeKind, int]] = [("brand", campaign.brand_id + 1), ("list", 2)]
    for kind, scope_id in scopes:
        suppress(engine, row.address_hash, before, kind, scope_id)
        assert find(engine, campaign, "none_suppressed_delivered").passed
    scopes = [("list", 1), ("brand", campaign.brand_id), ("all", 0)]
    for kind, scope_id in scopes:
        suppress(engine, row.address_hash, before, kind, scope_id)
        # One recipient is one breach, however many suppressions say so.
        assert find(engine, campaign, "none_suppressed_delivered").numbers["suppressed_addresses"] == 1


def test_a_domain_suppressed_before_fails(engine: sa.Engine) -> None:
    campaign = results(engine)
    in_domain = sa.select(Delivery.contact_id).join(Contact, Contact.id == Delivery.contact_id).where(Contact.domain == "web.de")
    with reading(engine) as connection:
        expected = len(connection.execute(in_domain.where(Delivery.state == int(State.DELIVERED))).all())
    transact(engine, lambda connection: consent.suppress_domain(connection, "web.de", reason="manual", now=START - dt.timedelta(days=1)))
    found = find(engine, campaign, "none_suppressed_delivered")
    assert expected > 0
    assert found.numbers == {"suppressed_addresses": 0, "suppressed_domains": expected}
    assert not found.passed


def test_a_suppressed_address_that_was_not_mailed_is_no_breach(engine: sa.Engine) -> None:
    campaign = results(engine)
    with reading(engine) as connection:
        hashes = connection.execute(sa.select(Delivery.address_hash).where(Delivery.state != int(State.DELIVERED))).scalars().all()
    transact(engine, lambda connection: consent.suppress(connection, hashes, reason="bounce", now=START - dt.timedelta(days=1)))
    assert find(engine, campaign, "none_suppressed_delivered").passed


# --- bounces ---


@pytest.mark.parametrize(
    ("hard", "answers", "passed", "severity"),
    [
        (0, 0, True, Severity.WARN),
        (99, 99, True, Severity.ERROR),
        (2, 100, True, Severity.WARN),
        (3, 100, False, Severity.WARN),
        (5, 100, False, Severity.WARN),
        (6, 100, False, Severity.ERROR),
    ],
)
def test_bounce_rate_warns_above_two_and_fails_above_five_percent(hard: int, answers: int, passed: bool, severity: Severity) -> None:
    found = checks.judge_bounces(hard, answers)
    assert (found.passed, found.severity) == (passed, severity)


def test_only_bounces_that_say_the_address_is_bad_count(engine: sa.Engine) -> None:
    reasons = ["spam_content"] * 30 + ["invalid_recipient"] * 10 + [""] * 160
    outcomes = [
        Outcome(number, number % SHARDS, "other", 1, State.BOUNCED if reason else State.DELIVERED, reason, START) for number, reason in enumerate(reasons, 1)
    ]
    found = find(engine, make_results(engine, 200, outcomes), "bounce_rate")
    assert found.numbers == {"hard_bounced": 10, "answers": 200, "rate": 0.05}
    assert not found.passed
