"""When what destinations say about an address suppresses it. The rules are data (`suppression.toml`).

What belongs here: the rules, and applying those that need more than one refusal, over the events of all campaigns. What does not: the
meaning of a single reply (`classes`), and the suppressions themselves (`contacts.consent`).
"""

from __future__ import annotations

import datetime as dt
import functools
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.contacts import consent
from mail_pipelines.contacts.consent import ScopeKind
from mail_pipelines.contacts.sets import slices
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Delivery, DeliveryEvent, State
from mail_pipelines.database.partitions import months_from
from mail_pipelines.delivery.classes import Action, classes_of, classify
from mail_pipelines.delivery.events import BOUNCE_REPORT, BOUNCED, DEFERRED, LATE_REFUSAL

RULES = Path(__file__).with_name("suppression.toml")
# Kinds of delivery events that are a destination's refusal.
_REFUSALS = (DEFERRED, BOUNCED, BOUNCE_REPORT, LATE_REFUSAL)


@dataclass(frozen=True)
class Rule:
    """So many refusals, each at least `apart` after the last that counted and none older than `within`, suppress an address."""

    refusals: int
    apart: dt.timedelta
    within: dt.timedelta


@functools.cache
def _document() -> dict[str, object]:
    return tomllib.loads(RULES.read_text(encoding="utf-8"))


@functools.cache
def rules() -> dict[Action, Rule]:
    """The rule of each action that counts against an address."""
    raw: list[dict[str, object]] = _document()["rule"]  # type: ignore[assignment]
    return {
        Action(str(rule["action"])): Rule(
            int(str(rule["refusals"])), dt.timedelta(hours=float(str(rule["apart_hours"]))), dt.timedelta(days=float(str(rule["within_days"])))
        )
        for rule in raw
    }


def is_at_once(action: Action) -> bool:
    """Whether one refusal of this kind suppresses the address."""
    rule = rules().get(action)
    return rule is not None and rule.refusals == 1


def complaint_scope() -> ScopeKind:
    """Where a complaint suppresses: `brand` or `all`."""
    scope: ScopeKind = _document()["complaint"]["scope"]  # type: ignore[index]
    return scope


def is_due(rule: Rule, refused_at: Iterable[dt.datetime], arrived_at: dt.datetime | None, now: dt.datetime) -> bool:
    """Whether these refusals suppress; `arrived_at` is when the last message arrived."""
    count = 0
    last: dt.datetime | None = None
    for moment in sorted(refused_at):
        if moment < now - rule.within or (arrived_at is not None and moment <= arrived_at):
            continue
        if last is None or moment - last >= rule.apart:
            count, last = count + 1, moment
    return count >= rule.refusals


def suppress_repeated(engine: Engine, now: dt.datetime) -> int:
    """Suppress the addresses that were refused often enough; returns how many were not suppressed before. Doing it again changes nothing."""
    repeated = {action: rule for action, rule in rules().items() if rule.refusals > 1}
    with reading(engine) as connection:
        suspects = _suspects(connection, repeated, now)
    suppressed = 0
    for chosen in slices(suspects):
        with reading(engine) as connection:
            hashes = list(_due(connection, repeated, chosen, now))
        if hashes:
            suppressed += transact(engine, lambda connection, hashes=hashes: consent.suppress(connection, hashes, reason="bounce", now=now))  # type: ignore[misc]
    return suppressed


def _suspects(connection: Connection, repeated: dict[Action, Rule], now: dt.datetime) -> list[int]:
    """Contacts with as many refusals of the classes in question as the mildest rule needs, whenever within its days."""
    since = now - max(rule.within for rule in repeated.values())
    months = (now.year - since.year) * 12 + now.month - since.month + 1
    query = (
        sa.select(DeliveryEvent.contact_id)
        .where(
            DeliveryEvent.month.in_(months_from(since.date(), months)),
            DeliveryEvent.occurred_at >= since,
            DeliveryEvent.kind.in_(_REFUSALS),
            DeliveryEvent.reason.in_(sorted(classes_of(*repeated))),
        )
        .group_by(DeliveryEvent.contact_id)
        .having(sa.func.count() >= min(rule.refusals for rule in repeated.values()))
        .order_by(DeliveryEvent.contact_id)
    )
    return list(connection.execute(query).scalars())


def _due(connection: Connection, repeated: dict[Action, Rule], contact_ids: list[int], now: dt.datetime) -> Iterator[bytes]:
    """The address hashes among these contacts that a rule suppresses. A contact that has changed its address is judged by that which was mailed."""
    same_row = sa.and_(Delivery.campaign_id == DeliveryEvent.campaign_id, Delivery.contact_id == DeliveryEvent.contact_id)
    event = DeliveryEvent
    refused: defaultdict[tuple[bytes, Action], list[dt.datetime]] = defaultdict(list)
    late = set()
    query = (
        sa.select(
            event.campaign_id, event.contact_id, event.kind, event.occurred_at, event.code, event.enhanced, event.text, Delivery.provider, Delivery.address_hash
        )
        .join(Delivery, same_row)
        .where(event.contact_id.in_(contact_ids), event.kind.in_(_REFUSALS))
    )
    for row in connection.execute(query):
        if row.kind == BOUNCE_REPORT:
            late.add((row.campaign_id, row.contact_id))
        # By the words again: a class may be that of rules with different actions.
        action = classify(row.provider, row.code, row.enhanced, row.text or "").action
        if action in repeated:
            refused[row.address_hash, action].append(row.occurred_at)
    arrived: dict[bytes, dt.datetime] = {}
    delivered = sa.select(Delivery.campaign_id, Delivery.contact_id, Delivery.address_hash, Delivery.sort_key).where(
        Delivery.contact_id.in_(contact_ids), Delivery.state == int(State.DELIVERED)
    )
    for campaign_id, contact_id, address_hash, second in connection.execute(delivered).tuples():
        if (campaign_id, contact_id) not in late:
            moment = dt.datetime.fromtimestamp(second, dt.UTC)
            arrived[address_hash] = max(moment, arrived.get(address_hash, moment))
    for (address_hash, action), moments in refused.items():
        if is_due(repeated[action], moments, arrived.get(address_hash), now):
            yield address_hash
