"""Suppression, unsubscribing and erasure, on both databases."""

from __future__ import annotations

import datetime as dt
import re

import pytest
import sqlalchemy as sa

from mail_pipelines.contacts import consent
from mail_pipelines.contacts.addresses import address_hash
from mail_pipelines.contacts.consent import ALL, ConsentError, Scope
from mail_pipelines.database.engine import is_mysql, reading, transact
from mail_pipelines.database.models import Contact, ContactChange, Subscription, Suppression
from tests.contacts.conftest import NOW, AddContact

LATER = NOW + dt.timedelta(hours=1)


def suppressed(engine: sa.Engine, *scopes: Scope) -> set[str]:
    clause = consent.suppressed_clause(Contact.address_hash, Contact.domain, scopes)
    with reading(engine) as connection:
        return set(connection.execute(sa.select(Contact.address).where(clause)).scalars())


def subscribed(engine: sa.Engine, contact_id: int) -> set[int]:
    with reading(engine) as connection:
        return set(connection.execute(sa.select(Subscription.list_id).where(Subscription.contact_id == contact_id, Subscription.subscribed)).scalars())


def changes(engine: sa.Engine) -> list[tuple[int, str]]:
    with reading(engine) as connection:
        return [tuple(row) for row in connection.execute(sa.select(ContactChange.contact_id, ContactChange.op).order_by(ContactChange.seq))]


def reasons(engine: sa.Engine) -> dict[tuple[str, int], str]:
    with reading(engine) as connection:
        rows = connection.execute(sa.select(Suppression.scope_kind, Suppression.scope_id, Suppression.reason)).all()
    return {(row.scope_kind, row.scope_id): row.reason for row in rows}


def test_a_suppression_counts_in_its_scope_only(engine: sa.Engine, add_contact: AddContact) -> None:
    for name in ("everywhere", "brand", "list", "free"):
        add_contact(f"{name}@example.test")
    add_contact("anyone@blocked.test")
    add_contact("anyone@sub.blocked.test")

    def work(connection: sa.Connection) -> None:
        consent.suppress(connection, [address_hash("everywhere@example.test")], reason="complaint", now=NOW)
        consent.suppress(connection, [address_hash("brand@example.test")], reason="manual", scope_kind="brand", scope_id=1, now=NOW)
        consent.suppress(connection, [address_hash("list@example.test")], reason="manual", scope_kind="list", scope_id=1, now=NOW)
        assert consent.suppress_domain(connection, " Blocked.test", reason="manual", now=NOW)
        assert not consent.suppress_domain(connection, "blocked.test", reason="manual", now=NOW)

    transact(engine, work)
    everywhere = {"everywhere@example.test", "anyone@blocked.test"}
    assert suppressed(engine, ALL) == everywhere
    assert suppressed(engine, *consent.campaign_scopes(1, None)) == everywhere | {"brand@example.test"}
    assert suppressed(engine, *consent.campaign_scopes(1, 1)) == everywhere | {"brand@example.test", "list@example.test"}
    assert suppressed(engine, *consent.campaign_scopes(2, 2)) == everywhere


def test_suppressing_again_adds_nothing_and_keeps_the_stronger_reason(engine: sa.Engine) -> None:
    hashes = [address_hash(f"a{number}@example.test") for number in range(12_000)]

    def suppress(reason: str, upto: int) -> int:
        return transact(engine, lambda connection: consent.suppress(connection, hashes[:upto], reason=reason, now=NOW))

    assert suppress("bounce", 8_000) == 8_000
    assert suppress("bounce", 8_000) == 0
    assert suppress("unsubscribe", 12_000) == 4_000
    assert suppress("bounce", 12_000) == 0
    with reading(engine) as connection:
        found = connection.execute(sa.select(Suppression.reason, sa.func.count()).group_by(Suppression.reason)).all()
    assert [tuple(row) for row in found] == [("unsubscribe", 12_000)]


def test_a_suppression_that_cannot_be_meant_is_refused(engine: sa.Engine) -> None:
    for scope_kind, scope_id in (("all", 3), ("brand", 0), ("campaign", 1)):
        with pytest.raises(ConsentError, match="expected 'all' with 0"):
            transact(engine, lambda c, kind=scope_kind, number=scope_id: consent.suppress(c, [], reason="manual", scope_kind=kind, scope_id=number, now=NOW))
    with pytest.raises(ConsentError, match="'mood' is not known; expected one of bounce, manual"):
        transact(engine, lambda connection: consent.suppress(connection, [], reason="mood", now=NOW))
    with pytest.raises(ConsentError, match="has no dot"):
        transact(engine, lambda connection: consent.suppress_domain(connection, "localhost", reason="manual", now=NOW))


@pytest.mark.parametrize(
    ("scope", "scope_id", "left"),
    [("list", 1, {2, 3}), ("brand", 1, {3}), ("all", 0, set())],
)
def test_unsubscribing_ends_the_subscriptions_of_its_scope(engine: sa.Engine, add_contact: AddContact, scope: str, scope_id: int, left: set[int]) -> None:
    ann, bob = add_contact("ann@example.test", "news", "shop", "jobs"), add_contact("bob@example.test", "news", "shop", "jobs")

    def work(connection: sa.Connection) -> int:
        return consent.unsubscribe(connection, [ann], scope=scope, scope_id=scope_id, now=LATER)  # type: ignore[arg-type]

    assert transact(engine, work) == 1
    assert subscribed(engine, ann) == left
    assert subscribed(engine, bob) == {1, 2, 3}
    assert suppressed(engine, Scope(scope, scope_id)) == {"ann@example.test"}  # type: ignore[arg-type]
    assert reasons(engine) == {(scope, scope_id): "unsubscribe"}
    assert changes(engine) == [(ann, "upsert")]
    with reading(engine) as connection:
        ended = connection.execute(sa.select(Subscription.source, Subscription.changed_at).where(~Subscription.subscribed)).all()
    assert {tuple(row) for row in ended} == {("unsubscribe", LATER)}


def test_unsubscribing_from_a_list_one_was_never_on_is_remembered(engine: sa.Engine, add_contact: AddContact) -> None:
    ann = add_contact("ann@example.test")
    transact(engine, lambda connection: consent.unsubscribe(connection, [ann, 999_999], scope="list", scope_id=2, now=LATER))
    with reading(engine) as connection:
        rows = connection.execute(sa.select(Subscription.contact_id, Subscription.list_id, Subscription.subscribed)).all()
    assert [tuple(row) for row in rows] == [(ann, 2, False)]


def test_erasure_leaves_only_the_hash(engine: sa.Engine, add_contact: AddContact) -> None:
    ann, bob = add_contact("ann@example.test", "news", "shop"), add_contact("bob@example.test", "news")
    transact(engine, lambda connection: consent.unsubscribe(connection, [ann], scope="all", now=NOW))
    assert transact(engine, lambda connection: consent.erase(connection, ann, now=LATER))
    assert not transact(engine, lambda connection: consent.erase(connection, ann, now=LATER))
    with reading(engine) as connection:
        assert connection.execute(sa.select(Contact.address)).scalars().all() == ["bob@example.test"]
        assert connection.execute(sa.select(Subscription.contact_id)).scalars().all() == [bob]
        kept = connection.execute(sa.select(Suppression.address_hash, Suppression.reason)).all()
    assert [tuple(row) for row in kept] == [(address_hash("ann@example.test"), "erased")]
    assert changes(engine) == [(ann, "upsert"), (ann, "delete")]


def test_the_claims_test_looks_up_unique_indexes(engine: sa.Engine, add_contact: AddContact) -> None:
    for number in range(20):
        add_contact(f"a{number}@example.test")
    hashes = [address_hash(f"x{number}@example.test") for number in range(3_000)]
    transact(engine, lambda connection: consent.suppress(connection, hashes, reason="bounce", now=NOW))
    clause = consent.suppressed_clause(Contact.address_hash, Contact.domain, consent.campaign_scopes(1, 1))
    query = sa.select(Contact.id, clause.label("suppressed")).where(Contact.id.in_(range(1, 21)))
    text = str(query.compile(engine, compile_kwargs={"literal_binds": True}))
    with reading(engine) as connection:
        if is_mysql(engine):
            connection.exec_driver_sql("ANALYZE TABLE contacts, suppressions").all()
        plan = [str(row) for row in connection.exec_driver_sql(f"EXPLAIN {'' if is_mysql(engine) else 'QUERY PLAN '}{text}") if "suppressions" in str(row)]
    assert len(plan) == 2
    for row in plan:
        assert re.search(r"'ref', 'uq_suppressions_|USING COVERING INDEX sqlite_autoindex_suppressions_", row), row
