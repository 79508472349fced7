"""Audits of a campaign's results: do the sums hold, is each recipient counted once, was anybody mailed who must not be, are there too many bounces.

What belongs here: questions to the database whose answer is "as promised" or a number of exceptions. These are the only readers that
count the ledger, shard by shard, so that no statement is long. What does not: repairing anything.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.orm import InstrumentedAttribute

from mail_pipelines.campaigns import progress
from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.contacts.consent import Scope, campaign_scopes
from mail_pipelines.database.epochs import epoch_second
from mail_pipelines.database.models import CampaignCounter, Claim, Contact, Delivery, State, Suppression
from mail_pipelines.delivery.ledger_archive import rows_in
from mail_pipelines.delivery.statistics import hard_bounces

WARN_BOUNCE_RATE = 0.02
FAIL_BOUNCE_RATE = 0.05
# Below this many answers a rate says nothing.
BOUNCE_RATE_ANSWERS = 100


class Severity(enum.StrEnum):
    WARN = "warn"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """The answer of a check: `numbers` by name, `description` in words; `severity` matters if it did not pass."""

    passed: bool
    numbers: dict[str, int | float]
    description: str
    severity: Severity = Severity.ERROR


@dataclass(frozen=True)
class Check:
    """A promise and the function that tests it. If a blocking one fails, the campaign's other numbers are not to be trusted either."""

    name: str
    promise: str
    blocking: bool
    find: Callable[[Connection, Campaign], Finding]


def sums_hold(connection: Connection, campaign: Campaign) -> Finding:
    """matched = audience + excluded, and audience = the sum of its parts by the counters.

    While the audience is loaded the parts may be less than it.
    """
    counts = campaign.audience_counts or {"matched": 0, "audience": 0, "excluded": {}}
    totals = progress.totals(connection, campaign)
    matched, excluded, parts = counts["matched"], sum(counts["excluded"].values()), totals.parts()
    passed = matched == totals.audience + excluded and min(parts.values()) >= 0 and _is_complete(campaign, sum(parts.values()), totals.audience)
    words = " + ".join(f"{count:,} {name}" for name, count in parts.items() if count) or "0"
    return Finding(
        passed,
        {"matched": matched, "excluded": excluded, "audience": totals.audience, "parts": sum(parts.values())},
        f"{matched:,} matched, {totals.audience:,} in the audience and {excluded:,} excluded; {words} is {sum(parts.values()):,}",
    )


def one_state_per_row(connection: Connection, campaign: Campaign) -> Finding:
    """The ledger has as many rows as the audience, in the states that the counters say. An archive has as many rows."""
    if campaign.archive is not None:
        archived, expected = rows_in(campaign.archive), (campaign.audience_counts or {}).get("audience", 0)
        return Finding(
            archived == expected, {"rows": archived, "audience": expected, "differing": 0}, f"{archived:,} archived rows for an audience of {expected:,}"
        )
    rows = differing = 0
    for shard in range(campaign.shards or 0):
        ledger, counted = _states_of_shard(connection, campaign.id, shard)
        rows += sum(ledger.values())
        differing += sum(abs(ledger.get(state, 0) - counted.get(state, 0)) for state in ledger.keys() | counted.keys())
    audience = (campaign.audience_counts or {}).get("audience", 0)
    return Finding(
        differing == 0 and _is_complete(campaign, rows, audience),
        {"rows": rows, "audience": audience, "differing": differing},
        f"{rows:,} ledger rows for an audience of {audience:,}; counts by shard and state differ from the counters by {differing:,}",
    )


def none_twice(connection: Connection, campaign: Campaign) -> Finding:
    """No address and no contact has a second row in the ledger."""
    if campaign.archive is not None:
        return _archived("second_rows_of_an_address", "second_rows_of_a_contact")
    addresses = _surplus(connection, campaign.id, Delivery.address_hash)
    contacts = _surplus(connection, campaign.id, Delivery.contact_id)
    return Finding(
        addresses == contacts == 0,
        {"second_rows_of_an_address": addresses, "second_rows_of_a_contact": contacts},
        f"{addresses:,} rows repeat an address, {contacts:,} repeat a contact",
    )


def none_suppressed_delivered(connection: Connection, campaign: Campaign) -> Finding:
    """Nobody got the message whose address, or its domain, was suppressed for this campaign before the message was claimed.

    For a row whose claim is not kept any more, the second of its delivery counts instead.
    """
    if campaign.archive is not None:
        return _archived("suppressed_addresses", "suppressed_domains")
    scopes = campaign_scopes(campaign.brand_id, campaign.list_id)
    by_address = sum(_suppressed_addresses(connection, campaign.id, shard, scopes) for shard in range(campaign.shards or 0))
    by_domain = _suppressed_domains(connection, campaign.id, scopes)
    return Finding(
        by_address == by_domain == 0,
        {"suppressed_addresses": by_address, "suppressed_domains": by_domain},
        f"{by_address:,} delivered to an address suppressed before, {by_domain:,} to a domain suppressed before",
    )


def bounce_rate(connection: Connection, campaign: Campaign) -> Finding:
    """Few of the answers say that the address is bad."""
    states = progress.by_state(connection, campaign.id)
    return judge_bounces(hard_bounces(connection, campaign.id), states[State.DELIVERED] + states[State.BOUNCED])


def judge_bounces(hard: int, answers: int) -> Finding:
    """A warning above 2 % of hard bounces, an error above 5 %, judged from 100 answers on."""
    rate = hard / answers if answers else 0.0
    return Finding(
        answers < BOUNCE_RATE_ANSWERS or rate <= WARN_BOUNCE_RATE,
        {"hard_bounced": hard, "answers": answers, "rate": round(rate, 5)},
        f"{hard:,} hard bounces in {answers:,} answers: {rate:.2%}" + ("" if answers >= BOUNCE_RATE_ANSWERS else ", too few to judge"),
        Severity.ERROR if rate > FAIL_BOUNCE_RATE else Severity.WARN,
    )


CHECKS = (
    Check("sums_hold", "matched = audience + excluded, and the audience is the sum of its parts", True, sums_hold),
    Check("one_state_per_row", "The ledger has one row for each recipient of the audience, in the state the counters say", True, one_state_per_row),
    Check("none_twice", "No address and no contact is in the ledger twice", False, none_twice),
    Check("none_suppressed_delivered", "Nobody was mailed who was suppressed before", False, none_suppressed_delivered),
    Check("bounce_rate", "At most 2 % of the answers are hard bounces; more than 5 % is an error", False, bounce_rate),
)


def _archived(*numbers: str) -> Finding:
    return Finding(True, dict.fromkeys(numbers, 0), "not looked at again: the campaign is archived")


def _is_complete(campaign: Campaign, found: int, audience: int) -> bool:
    return found <= audience if campaign.state is CampaignState.BUILDING else found == audience


def _states_of_shard(connection: Connection, campaign_id: int, shard: int) -> tuple[dict[int, int], dict[int, int]]:
    """Rows by state, in the ledger and by the counters, as of one moment: a single statement, so that sending may go on meanwhile."""
    ledger = sa.select(sa.literal(0).label("source"), Delivery.state, sa.func.count().label("rows_found"))
    ledger = ledger.where(Delivery.campaign_id == campaign_id, Delivery.shard == shard).group_by(Delivery.state)
    counted = sa.select(sa.literal(1), CampaignCounter.state, sa.func.sum(CampaignCounter.count))
    counted = counted.where(CampaignCounter.campaign_id == campaign_id, CampaignCounter.shard == shard).group_by(CampaignCounter.state)
    found: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for source, state, count in connection.execute(sa.union_all(ledger, counted)):
        found[source][state] = int(count)
    return found


def _surplus(connection: Connection, campaign_id: int, column: InstrumentedAttribute[Any]) -> int:
    """Rows beyond the first of each value, along the unique index of `column` within the campaign."""
    rows = sa.func.count().label("rows_found")
    repeated = sa.select(rows).where(Delivery.campaign_id == campaign_id).group_by(column).having(rows > 1).subquery()
    return int(connection.execute(sa.select(sa.func.coalesce(sa.func.sum(repeated.c.rows_found - 1), 0))).scalar_one())


def _suppressed_before(connection: Connection, scopes: Sequence[Scope]) -> sa.ColumnElement[bool]:
    """Of a delivered row joined with a suppression and (outer) its claim: the suppression counts, and was there first."""
    return sa.and_(
        Delivery.state == int(State.DELIVERED),
        sa.or_(*(sa.and_(Suppression.scope_kind == scope.kind, Suppression.scope_id == scope.id) for scope in scopes)),
        sa.or_(
            Suppression.created_at < Claim.opened_at,
            sa.and_(Claim.id.is_(None), epoch_second(connection, Suppression.created_at) < Delivery.sort_key),
        ),
    )


def _suppressed_addresses(connection: Connection, campaign_id: int, shard: int, scopes: Sequence[Scope]) -> int:
    query = (
        sa.select(sa.func.count(Delivery.contact_id.distinct()))
        .join(Suppression, Suppression.address_hash == Delivery.address_hash)
        .outerjoin(Claim, Claim.id == Delivery.claim_id)
        .where(Delivery.campaign_id == campaign_id, Delivery.shard == shard, _suppressed_before(connection, scopes))
    )
    return connection.execute(query).scalar_one()


def _suppressed_domains(connection: Connection, campaign_id: int, scopes: Sequence[Scope]) -> int:
    # The ledger has no domains: they are those of contacts that still have the address that was mailed.
    query = (
        sa.select(sa.func.count(Delivery.contact_id.distinct()))
        .select_from(Suppression)
        .join(Contact, Contact.domain == Suppression.domain)
        .join(Delivery, sa.and_(Delivery.campaign_id == campaign_id, Delivery.contact_id == Contact.id, Delivery.address_hash == Contact.address_hash))
        .outerjoin(Claim, Claim.id == Delivery.claim_id)
        .where(Suppression.domain.is_not(None), _suppressed_before(connection, scopes))
    )
    return connection.execute(query).scalar_one()
