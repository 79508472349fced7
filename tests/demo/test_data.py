"""The demo's data: the same everywhere, with everything an import meets, and a past that the ledger's own checks accept."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import sqlalchemy as sa

from mail_pipelines.campaigns import progress, store
from mail_pipelines.contacts import consent
from mail_pipelines.contacts.importing import import_file
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Contact, Delivery, EngagementEvent, Subscription
from mail_pipelines.demo import data, people

NOW = dt.datetime(2026, 11, 24, 9, 30, tzinfo=dt.UTC)


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    first, again, other = (data.write(tmp_path / name, contacts=2_000, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert [path.read_bytes() for path, _ in first.imports] == [path.read_bytes() for path, _ in again.imports]
    assert first.imports[0][0].read_bytes() != other.imports[0][0].read_bytes()


def test_people_are_spread_over_providers_and_have_typed_fields(tmp_path: Path) -> None:
    files = data.write(tmp_path, contacts=20_000)
    table = pq.read_table(files.imports[1][0])
    assert table.schema.names == list(people.COLUMNS)
    assert [str(table.schema.field(name).type) for name in ("birthday", "orders", "vip", "signup")] == ["date32[day]", "int32", "bool", "date32[day]"]
    assert len(table) == 8_000 + files.repeated
    domains = pc.utf8_lower(pc.replace_substring_regex(table["email"], ".*@", ""))
    for domain, share in people.DOMAINS.items():
        assert abs(pc.sum(pc.equal(domains, domain)).as_py() / len(table) - share) < 0.02
    assert len(set(domains.to_pylist()) - set(people.DOMAINS)) == 200
    assert pc.all(pc.is_in(table["last_name"], pa.array(people.SURNAMES))).as_py()


def test_imported_people_get_a_past_that_adds_up(engine: sa.Engine, tmp_path: Path) -> None:
    files = data.write(tmp_path, contacts=5_000)
    reports = [import_file(engine, path, list_name=name, now=NOW) for path, name in files.imports]
    assert sum(report.inserted for report in reports) == files.contacts == 5_000
    assert reports[1].updated == files.repeated > 0
    assert reports[0].rejected == files.bad > 0
    assert sum(report.read for report in reports) == files.rows
    past = data.engagement(engine, NOW)
    with reading(engine) as connection:
        for key, _, _ in data.EARLIER:
            campaign = store.load(connection, key)
            totals = progress.totals(connection, campaign).check()
            assert (totals.audience, totals.delivered, totals.bounced) == (1_250, 1_238, 12)
            rows = sa.select(sa.func.count()).where(Delivery.campaign_id == campaign.id)
            assert connection.execute(rows).scalar_one() == 1_250
        opened = sa.select(sa.func.count()).select_from(
            sa.select(EngagementEvent.campaign_id, EngagementEvent.contact_id)
            .where(EngagementEvent.kind == "open", ~EngagementEvent.machine)
            .distinct()
            .subquery()
        )
        assert connection.execute(opened).scalar_one() == past.openers == 742
        assert connection.execute(sa.select(sa.func.count()).select_from(EngagementEvent)).scalar_one() == past.events
        assert connection.execute(sa.select(sa.func.max(EngagementEvent.occurred_at))).scalar_one() <= NOW
        clause = consent.suppressed_clause(Contact.address_hash, Contact.domain, consent.campaign_scopes(1, 1))
        suppressed = connection.execute(sa.select(sa.func.count()).select_from(Contact).where(clause)).scalar_one()
        ended = connection.execute(sa.select(sa.func.count(Subscription.contact_id.distinct())).where(~Subscription.subscribed)).scalar_one()
    assert 0.03 < suppressed / 5_000 < 0.06
    assert ended == past.unsubscribed == 125
