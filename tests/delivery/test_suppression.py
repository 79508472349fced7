"""Who is suppressed after how many refusals, by the rules in the data file."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

import pytest
import sqlalchemy as sa

from mail_pipelines.contacts import consent
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Delivery, DeliveryEvent, State, Suppression
from mail_pipelines.delivery import suppression
from mail_pipelines.delivery.classes import Action, classify
from mail_pipelines.delivery.suppression import Rule, is_due, rules

NOW = dt.datetime(2026, 3, 20, 9, 0, tzinfo=dt.UTC)
FULL = {"code": 452, "enhanced": "4.2.2", "text": "mailbox full"}
NO_DOMAIN = {"code": 550, "enhanced": "5.1.2", "text": "no such domain"}
POLICY = {"code": 550, "enhanced": "5.7.1", "text": "not accepted"}
RULE = Rule(3, dt.timedelta(hours=24), dt.timedelta(days=10))


def days_ago(*days: float) -> list[dt.datetime]:
    return [NOW - dt.timedelta(days=number) for number in days]


@pytest.mark.parametrize(
    ("refused", "arrived", "due"),
    [
        ((5, 3, 1), None, True),
        ((3, 1), None, False),
        # On the same day, or less than one apart from the last that counted.
        ((3, 2.9, 2.8, 1), None, False),
        ((3, 2.2, 1.9, 0.5), None, True),
        # Too old.
        ((11, 5, 1), None, False),
        # Only what came after the last success.
        ((5, 3, 1), 4, False),
        ((5, 3, 1), 6, True),
        ((5, 3, 1), 5, False),
        ((), None, False),
    ],
)
def test_refusals_count_if_they_are_apart_young_and_after_the_last_success(refused: Iterable[float], arrived: float | None, due: bool) -> None:
    assert is_due(RULE, days_ago(*refused), None if arrived is None else days_ago(arrived)[0], NOW) is due


def test_the_rules_are_those_of_the_notes() -> None:
    assert {action: rule.refusals for action, rule in rules().items()} == {Action.HARD: 1, Action.HARD_SECOND: 2, Action.SOFT: 5}
    assert [action for action in Action if suppression.is_at_once(action)] == [Action.HARD]
    assert suppression.complaint_scope() in ("brand", "all")


def refuse(engine: sa.Engine, contact_id: int, words: dict[str, object], moments: Iterable[dt.datetime], *, kind: str = "deferred") -> None:
    """One campaign for each refusal of a contact, which is at Google."""
    for number, at in enumerate(moments):
        campaign_id = 2 + number
        reason = classify("google", words["code"], words["enhanced"], words["text"]).reason  # type: ignore[arg-type]
        event = {"month": at.year * 100 + at.month, "id": contact_id * 1000 + number, "occurred_at": at, "campaign_id": campaign_id, "contact_id": contact_id}
        row = {"campaign_id": campaign_id, "contact_id": contact_id, "address_hash": contact_id.to_bytes(16, "big"), "shard": 0, "provider": "google"}
        row |= {"state": int(State.DELIVERED if kind == "bounce_report" else State.EXPIRED), "sort_key": int(at.timestamp()), "attempt": 1}

        def work(connection: sa.Connection, event: dict[str, object] = event, row: dict[str, object] = row, reason: str = reason) -> None:
            connection.execute(sa.insert(DeliveryEvent).values(**event, **words, attempt=0, kind=kind, reason=reason))
            connection.execute(sa.insert(Delivery).values(**row))

        transact(engine, work)


def succeed(engine: sa.Engine, contact_id: int, at: dt.datetime) -> None:
    row = {"campaign_id": 1, "contact_id": contact_id, "address_hash": contact_id.to_bytes(16, "big"), "shard": 0, "provider": "google", "attempt": 0}
    transact(engine, lambda connection: connection.execute(sa.insert(Delivery).values(**row, state=int(State.DELIVERED), sort_key=int(at.timestamp()))))


def suppressed(engine: sa.Engine) -> set[int]:
    with reading(engine) as connection:
        return {int.from_bytes(found, "big") for found in connection.execute(sa.select(Suppression.address_hash)).scalars() if found}


def test_repeated_refusals_suppress_and_policy_never_does(engine: sa.Engine) -> None:
    soft = days_ago(25, 20, 15, 10, 5)
    refuse(engine, 1, FULL, soft)
    refuse(engine, 2, FULL, soft[:4])
    refuse(engine, 3, FULL, soft)
    succeed(engine, 3, days_ago(12)[0])
    refuse(engine, 4, POLICY, days_ago(*range(1, 20)), kind="bounced")
    refuse(engine, 5, NO_DOMAIN, days_ago(3, 1), kind="bounced")
    refuse(engine, 6, NO_DOMAIN, days_ago(1.5, 1), kind="bounced")
    # A message that bounced after it was accepted is no success.
    refuse(engine, 7, NO_DOMAIN, days_ago(30, 1), kind="bounce_report")
    refuse(engine, 8, NO_DOMAIN, days_ago(90, 1), kind="bounced")
    assert suppression.suppress_repeated(engine, NOW) == 3
    assert suppressed(engine) == {1, 5, 7}
    assert suppression.suppress_repeated(engine, NOW) == 0


def test_an_opt_out_is_not_weakened_by_a_bounce(engine: sa.Engine) -> None:
    refuse(engine, 5, NO_DOMAIN, days_ago(3, 1), kind="bounced")
    transact(engine, lambda connection: consent.suppress(connection, [(5).to_bytes(16, "big")], reason="complaint", now=NOW))
    assert suppression.suppress_repeated(engine, NOW) == 0
    with reading(engine) as connection:
        assert connection.execute(sa.select(Suppression.reason)).scalar_one() == "complaint"
