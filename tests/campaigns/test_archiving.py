"""Archived campaigns: nothing is deleted that is not in the archive, whatever is killed or broken, and every question is answered as before."""

from __future__ import annotations

import datetime as dt
import functools
import os
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.campaigns import archiving, audience, lifecycle, progress, states, why
from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.campaigns.states import Actor, CampaignState, StateError
from mail_pipelines.config import CampaignSettings, ConfigError, Settings
from mail_pipelines.config import load as load_settings
from mail_pipelines.contacts import consent
from mail_pipelines.contacts.addresses import parse
from mail_pipelines.database import migrate, models, partitions
from mail_pipelines.database.engine import create_engine, reading, transact
from mail_pipelines.database.models import Claim, Delivery, DeliveryEvent, EngagementEvent, State
from mail_pipelines.delivery import checks, counters, evidence, ledger_archive, suppression
from mail_pipelines.delivery.events import event_id
from mail_pipelines.delivery.evidence import Effect, Evidence, Kind
from mail_pipelines.delivery.ledger_archive import LedgerArchive, LedgerArchiveError
from mail_pipelines.segments.snapshots import open_snapshots, refresh_contacts, refresh_engagement
from tests.campaigns.parts import NOW, contact_rows, fill_ledger, load, make_campaign, refresh_snapshots
from tests.dispatch.test_hold_commands import says
from tests.parts.kills import killed_at
from tests.parts.processes import wait_for
from tests.parts.transactions import sizes_of_transactions

END = NOW + dt.timedelta(hours=3)
LATER = END + dt.timedelta(days=181)
PEOPLE = 24
TABLES = (Delivery, DeliveryEvent)
# By the number of the contact, from its number modulo 6 on.
ENDS = (State.DELIVERED, State.DELIVERED, State.BOUNCED, State.SUPPRESSED, State.UNRESOLVED, State.EXPIRED)


def address(number: int) -> str:
    return str(contact_rows([number])[0]["email"])


def at(minutes: float) -> dt.datetime:
    return NOW + dt.timedelta(minutes=minutes)


def refusal(number: int) -> str:
    """How a bounced recipient became that: by the answer of the destination, or (unknown first) by a report that came later."""
    return "bounced" if number % 4 == 0 else "bounce_report"


@dataclass
class Old:
    """The campaign `spring-sale`, sent to two dozen people half a year ago, with everything that can have happened to one of them."""

    engine: sa.Engine
    settings: Settings
    # So few that there are several files.
    file_rows: int = 10

    def __post_init__(self) -> None:
        Path(self.settings.campaigns.archive).mkdir(parents=True)
        counts = {"matched": PEOPLE, "audience": PEOPLE - 1, "excluded": {"suppressed": 1}}
        frozen = {"start_at": NOW, "started_at": NOW, "shards": 1, "audience_manifest": {"file": "frozen"}, "audience_counts": counts}
        campaign = make_campaign(self.engine, state="sending", **frozen)
        transact(self.engine, self._freeze)
        transact(self.engine, self._send)
        assert lifecycle.finish_if_done(self.engine, campaign.id, END)

    def _freeze(self, connection: sa.Connection) -> None:
        """Everybody but the seventh."""
        contacts = contact_rows(range(1, PEOPLE + 1))
        connection.execute(sa.insert(models.Contact), contacts)
        consent.suppress(connection, [contacts[6]["address_hash"]], reason="manual", now=NOW)
        waiting = {"campaign_id": 1, "shard": 0, "state": int(State.PENDING), "sort_key": 0, "attempt": 0}
        taken = [contact for contact in contacts if contact["id"] != 7]
        rows = [waiting | {"contact_id": one["id"], "address_hash": one["address_hash"], "provider": one["provider"]} for one in taken]
        connection.execute(sa.insert(Delivery), rows)
        counters.add(connection, 1, counters.CENTRE, Counter((0, one["provider"], State.PENDING, "") for one in taken), NOW)

    def _send(self, connection: sa.Connection) -> None:
        connection.execute(sa.insert(models.Server).values(id=3, key="mx3", kind="exim", host="127.0.0.1", port=25, pool_id=1, state="active", created_at=NOW))
        claim = {"campaign_id": 1, "shard": 0, "provider": "other", "server_id": 3, "run_id": "run", "size": 10, "state": "closed", "incarnation": "i"}
        claim |= {"boot_id": "b", "journal_inode": 1, "journal_offset": 0, "lease_until": at(2), "closed_at": at(2)}
        connection.execute(sa.insert(Claim), [claim | {"id": 7_000 + number, "opened_at": at(1 + number / 60)} for number in range(PEOPLE)])
        moves: Counter[counters.Place] = Counter()
        for row in connection.execute(sa.select(Delivery.contact_id, Delivery.shard, Delivery.provider)).all():
            number, state = row.contact_id, ENDS[row.contact_id % 6]
            words: dict[str, Any] = {"code": 550, "enhanced": "5.1.1", "reason": "invalid_recipient"} if state is State.BOUNCED else {}
            words |= {"code": 250} if state is State.DELIVERED else {}
            claimed = {"claim_id": 7_000 + number, "server_id": 3} if state in (State.DELIVERED, State.BOUNCED, State.UNRESOLVED) else {}
            values = {"state": int(state), "sort_key": int(at(number).timestamp()), "attempt": number % 2}
            connection.execute(sa.update(Delivery).where(Delivery.contact_id == number).values(**values, **words, **claimed))
            moves[row.shard, row.provider, State.PENDING, ""] -= 1
            moves[row.shard, row.provider, state, str(words.get("reason", ""))] += 1
            if state is State.BOUNCED:
                self.say(connection, number, refusal(number), number % 2, **words, text="550 5.1.1 <***@example.net> user unknown")
            if number % 2:
                self.say(connection, number, "deferred", 0, code=450, enhanced="4.2.0", reason="rate_limited", text="slow – später")
            if state is State.DELIVERED:
                opened = {"month": 202603, "id": number, "occurred_at": at(60), "recorded_at": at(61), "campaign_id": 1, "contact_id": number, "kind": "open"}
                connection.execute(sa.insert(EngagementEvent).values(**opened, machine=number % 4 == 0))
        counters.add(connection, 1, 3, moves, at(90))

    @staticmethod
    def say(connection: sa.Connection, number: int, kind: str, attempt: int, **words: Any) -> None:
        place = {"month": 202603, "id": event_id(1, number, attempt, kind), "occurred_at": at(number + 0.5), "server_id": 3, "campaign_id": 1}
        connection.execute(sa.insert(DeliveryEvent).values(**place, contact_id=number, attempt=attempt, kind=kind, **words))

    @property
    def archive(self) -> LedgerArchive:
        return LedgerArchive(self.settings.campaigns.archive, file_rows=self.file_rows)

    @property
    def folder(self) -> Path:
        return Path(self.settings.campaigns.archive) / "1"

    def archive_it(self) -> int:
        return archiving.archive_one(self.engine, self.archive, load(self.engine), LATER)

    def close(self) -> None:
        """The first step alone: the ledger changes no more, and is still in the database."""
        move = (1, CampaignState.FINISHED, CampaignState.ARCHIVED)
        transact(self.engine, lambda connection: states.move(connection, *move, actor=Actor.CENTRE, now=LATER))

    def rows(self) -> dict[str, int]:
        with reading(self.engine) as connection:
            return {table.__tablename__: connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() for table in TABLES}

    def totals(self) -> progress.Totals:
        with reading(self.engine) as connection:
            return progress.totals(connection, load(self.engine)).check()

    def answers(self) -> dict[str, why.Answer]:
        """Of everybody, of somebody who was left out, and of a stranger."""
        addresses = [*(address(number) for number in range(1, PEOPLE + 1)), "stranger@example.net"]
        return {one: self.answer(one) for one in addresses}

    def answer(self, email: str) -> why.Answer:
        return why.of_campaign(self.engine, self.settings, email, "spring-sale", END)

    def receivers(self) -> dict[int, dt.datetime]:
        with open_snapshots(self.engine, self.settings.snapshot_folder) as pinned:
            layer = pinned.engagement.received[0].layer
            tables = [pq.read_table(pinned.engagement_folder / part.name) for part in layer]
        return {row["contact_id"]: row["received_at"] for table in tables for row in table.to_pylist()}

    def apply(self, *pieces: Evidence) -> list[Effect]:
        return transact(self.engine, lambda connection: evidence.apply(connection, pieces, LATER, self.archive))

    def facts(self) -> dict[str, int]:
        with reading(self.engine) as connection:
            return progress.facts(connection, 1)

    def suppressed(self, number: int) -> set[tuple[str, str]]:
        row = models.Suppression
        query = sa.select(row.reason, row.scope_kind).where(row.address_hash == parse(address(number)).hash)
        with reading(self.engine) as connection:
            return set(connection.execute(query).tuples())


@pytest.fixture
def old(engine: sa.Engine, settings: Settings) -> Old:
    return Old(engine, settings)


def piece(kind: Kind, number: int, attempt: int | None = None) -> Evidence:
    words: dict[str, Any] = {"code": 550, "enhanced": "5.1.1", "text": "550 5.1.1 user unknown"} if kind in evidence.FAILED else {}
    return Evidence(kind, 1, number, number % 2 if attempt is None else attempt, LATER, **words)


# --- answers ------------------------------------------------------------------------------------------------------


def test_every_question_is_answered_from_the_archive_as_before(old: Old) -> None:
    transact(old.engine, lambda connection: consent.erase(connection, 12, now=END))
    before, totals, listed = old.answers(), old.totals(), why.recent(old.engine, old.settings, address(6))
    assert len({answer.verdict for answer in before.values()}) == 6
    assert any("claim 7013 on mx3, run run" in moment.what for moment in before[address(13)].moments)
    kept = old.rows()
    assert kept["deliveries"] == PEOPLE - 1
    assert old.archive_it() == sum(kept.values())
    assert old.rows() == {"deliveries": 0, "delivery_events": 0}
    transact(old.engine, lambda connection: connection.execute(sa.delete(Claim)))
    assert old.answers() == before
    assert why.recent(old.engine, old.settings, address(6)) == listed
    assert old.totals() == totals
    campaign = load(old.engine)
    assert (campaign.state, campaign.finished_at, campaign.archived_at) == (CampaignState.ARCHIVED, END, LATER)
    with reading(old.engine) as connection:
        assert all(check.find(connection, campaign).passed for check in checks.CHECKS if check.name != "bounce_rate")


def test_every_question_is_answered_while_rows_go(old: Old) -> None:
    before = old.answers()
    old.close()
    assert old.answers() == before
    manifest = old.archive.write(old.engine, 1)
    transact(old.engine, lambda connection: connection.execute(sa.update(models.Campaign).values(archive=manifest)))
    assert old.answers() == before
    # Some recipients are gone, some events of others.
    transact(old.engine, lambda connection: connection.execute(sa.delete(Delivery).where(Delivery.contact_id <= 17)))
    transact(old.engine, lambda connection: connection.execute(sa.delete(DeliveryEvent).where(DeliveryEvent.contact_id <= 9)))
    assert old.answers() == before


def test_who_received_it_is_known_from_the_archive(old: Old) -> None:
    refresh_snapshots(old.engine, old.settings, END)
    before = old.receivers()
    assert len(before) == 7
    old.archive_it()
    with pytest.raises(LedgerArchiveError, match="not set"):
        refresh_engagement(old.engine, old.settings.snapshot_folder / "anew", now=LATER)
    refresh_engagement(old.engine, old.settings.snapshot_folder, now=LATER)
    assert old.receivers() == before
    old.settings = old.settings.model_copy(update={"snapshots": old.settings.snapshots.model_copy(update={"folder": f"{old.settings.snapshots.folder}-2"})})
    refresh_contacts(old.engine, old.settings.snapshot_folder, now=LATER)
    refresh_engagement(old.engine, old.settings.snapshot_folder, now=LATER, archive=old.archive)
    assert old.receivers() == before


def test_an_archive_may_be_any_store_that_fsspec_knows(old: Old) -> None:
    before = old.answers()
    old.settings = old.settings.model_copy(update={"campaigns": CampaignSettings(archive="memory://archive")})
    old.archive_it()
    assert old.rows()["deliveries"] == 0
    assert old.answers() == before


# --- when, and when not -------------------------------------------------------------------------------------------


def test_a_night_archives_what_is_old_enough(old: Old) -> None:
    make_campaign(old.engine, "Draft")
    make_campaign(old.engine, "Never frozen", state="cancelled", finished_at=NOW)
    day = dt.timedelta(days=1)
    assert archiving.archive_old(old.engine, old.settings, END + 179 * day) == archiving.Report({}, {})
    report = archiving.archive_old(old.engine, old.settings, END + 180 * day)
    assert (set(report.archived), report.failed) == ({"spring-sale"}, {})
    assert archiving.archive_old(old.engine, old.settings, END + 900 * day) == archiving.Report({}, {})
    empty = old.settings.model_copy(update={"campaigns": CampaignSettings(archive="")})
    assert archiving.archive_old(old.engine, empty, END + 900 * day) == archiving.Report({}, {})


def test_an_archived_campaign_is_neither_frozen_nor_sent_nor_cancelled_again(old: Old) -> None:
    old.archive_it()
    assert "archived" in audience.build(old.engine, old.settings, "spring-sale", LATER).reason
    with pytest.raises(StateError, match="nothing is possible: it is over"):
        lifecycle.cancel(old.engine, "spring-sale", LATER)
    assert old.rows() == {"deliveries": 0, "delivery_events": 0}


def test_open_rows_and_claims_keep_a_campaign_from_the_archive(old: Old) -> None:
    def reopen(connection: sa.Connection) -> None:
        row = connection.execute(sa.select(Delivery.shard, Delivery.provider).where(Delivery.contact_id == 4)).one()
        connection.execute(sa.update(Delivery).where(Delivery.contact_id == 4).values(state=int(State.UNKNOWN)))
        moves = {(row.shard, row.provider, State.UNRESOLVED, ""): -1, (row.shard, row.provider, State.UNKNOWN, ""): 1}
        counters.add(connection, 1, 3, moves, END)

    transact(old.engine, lambda connection: connection.execute(sa.update(Claim).where(Claim.id == 7_001).values(state="settling")))
    with pytest.raises(StateError, match="open"):
        old.archive_it()
    transact(old.engine, lambda connection: connection.execute(sa.update(Claim).values(state="closed")))
    transact(old.engine, reopen)
    report = archiving.archive_old(old.engine, old.settings, LATER)
    assert "outcome is open" in report.failed["spring-sale"]
    assert load(old.engine).state is CampaignState.FINISHED
    lifecycle.give_up_unknown(old.engine, 1, LATER, 0)
    assert old.archive_it() > 0


def test_refusals_that_count_against_an_address_are_never_archived() -> None:
    shortest = min(item.ge for item in CampaignSettings.model_fields["archive_after_days"].metadata if hasattr(item, "ge"))
    assert max(rule.within for rule in suppression.rules().values()) <= dt.timedelta(days=shortest)
    with pytest.raises(ConfigError, match="archive_after_days"):
        load_settings({**os.environ, "MAIL_PIPELINES_CAMPAIGNS__ARCHIVE_AFTER_DAYS": "59"})


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_nothing_is_deleted_that_is_not_in_the_archive_as_it_was_written(old: Old) -> None:
    old.close()
    manifest = old.archive.write(old.engine, 1)
    transact(old.engine, lambda connection: connection.execute(sa.update(models.Campaign).values(archive=manifest)))
    kept = old.rows()
    damaged = old.folder / manifest["delivery_events"][1]["name"]
    data = damaged.read_bytes()
    for wrong in (data[:-1], data[:200] + b"x" + data[201:], None):
        damaged.unlink() if wrong is None else damaged.write_bytes(wrong)
        report = archiving.archive_old(old.engine, old.settings, LATER)
        assert "nothing is deleted" in report.failed["spring-sale"] or "stays there" in report.failed["spring-sale"]
        assert old.rows() == kept
    damaged.write_bytes(data)
    assert old.archive_it() == sum(kept.values())


def test_a_ledger_that_is_not_the_audience_is_kept(old: Old) -> None:
    transact(old.engine, lambda connection: connection.execute(sa.delete(Delivery).where(Delivery.contact_id == 5)))
    report = archiving.archive_old(old.engine, old.settings, LATER)
    assert report.failed == {"spring-sale": "the ledger of campaign spring-sale has 22 rows for an audience of 23: nothing is deleted"}
    assert old.rows()["deliveries"] == 22


def test_an_archive_that_is_away_or_full_costs_nothing_but_a_night(old: Old) -> None:
    kept, folder = old.rows(), Path(old.settings.campaigns.archive)
    away = folder.rename(f"{folder}.away")
    assert "is not there: make the folder" in archiving.archive_old(old.engine, old.settings, LATER).failed["spring-sale"]
    assert load(old.engine).state is CampaignState.FINISHED
    away.rename(folder)
    # A folder in which nothing can be written, even by root.
    old.folder.write_text("a file")
    assert "cannot be written" in archiving.archive_old(old.engine, old.settings, LATER).failed["spring-sale"]
    assert old.rows() == kept
    old.folder.unlink()
    assert old.archive_it() == sum(kept.values())


def archive_in_steps(old: Old, engine: sa.Engine, one_more: Callable[..., None]) -> None:
    """Each use of a file in the archive is a step, too."""
    in_archive = str(old.folder)
    sys.addaudithook(lambda name, given: one_more() if name in ("open", "os.rename", "os.mkdir", "os.remove") and in_archive in str(given) else None)
    archiving.archive_one(engine, old.archive, load(engine), LATER)


def test_killed_anywhere_it_goes_on_without_loss(old: Old, database_url: str) -> None:
    """At every fifth step (ninth on MariaDB); each process goes on with what the one before has left, and takes the first steps again and again."""
    before, kept = old.answers(), old.rows()
    step, kills = 1, 0
    while load(old.engine).archived_at is None:
        old.engine.dispose()
        if not killed_at(step, database_url, functools.partial(archive_in_steps, old)):
            break
        kills += 1
        assert old.rows() == kept or load(old.engine).archive is not None
        step += 5 if old.engine.dialect.name == "sqlite" else 9
    assert kills > 5
    assert old.rows() == {"deliveries": 0, "delivery_events": 0}
    assert old.answers() == before
    manifest = load(old.engine).archive or {}
    assert {path.name for path in old.folder.iterdir()} == {file["name"] for files in manifest.values() for file in files}


# --- what comes late ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["closed", "archived"])
def test_late_evidence_has_its_effects(old: Old, stage: str) -> None:
    old.close() if stage == "closed" else old.archive_it()
    totals = old.totals()
    late = [piece(Kind.BOUNCE_REPORT, 6), piece(Kind.UNSUBSCRIBE, 18), piece(Kind.COMPLAINT, 24)]
    assert old.apply(*late) == [Effect.NEW] * 3
    assert old.apply(*late) == [Effect.KNOWN] * 3
    assert old.facts() == {counters.LATE_BOUNCE: 1, "unsubscribed": 1, "complained": 1}
    assert (old.suppressed(6), old.suppressed(18), old.suppressed(24)) == ({("bounce", "all")}, {("unsubscribe", "brand")}, {("complaint", "brand")})
    assert old.totals() == totals
    # What the destination itself had said stays; what only a report had said, and what was never sent, is another matter.
    assert old.apply(piece(Kind.UNSUBSCRIBE, 8), piece(Kind.DELIVERY_REPORT, 2), piece(Kind.BOUNCE_REPORT, 99), piece(Kind.COMPLAINT, 6, 3)) == [
        Effect.NEW,
        Effect.NEW,
        Effect.UNMATCHED,
        Effect.UNMATCHED,
    ]
    assert old.totals().bounced == totals.bounced - 1
    assert old.totals().delivered == totals.delivered + 1
    if stage == "closed":
        old.archive_it()
    assert old.answer(address(2)).verdict == "delivered, through mx3: it was taken by the destination"
    assert old.answer(address(8)).verdict.startswith("bounced")
    assert old.answer(address(6)).moments[-1] == why.Moment(LATER, "attempt 0: bounce_report, 550 5.1.1 invalid_recipient 550 5.1.1 user unknown")
    assert old.apply(piece(Kind.DELIVERY_REPORT, 2)) == [Effect.KNOWN]
    assert old.totals().bounced == totals.bounced - 1


@pytest.mark.server
def test_a_change_that_is_under_way_is_in_the_archive(mariadb: MariaDB, settings: Settings) -> None:
    """Whoever changes the ledger holds the campaign's row, and archiving waits for it."""
    engine = create_engine(mariadb.database())
    migrate.upgrade(engine)
    old = Old(engine, settings)
    expected = old.totals()
    with ThreadPoolExecutor(1) as pool, engine.connect() as connection:
        # A bounce that only a report had told was none: the ledger's row changes.
        assert evidence.apply(connection, [piece(Kind.DELIVERY_REPORT, 2)], LATER, old.archive) == [Effect.NEW]
        archived = pool.submit(old.archive_it)
        # Not `innodb_trx`, which gives whoever asks again within a tenth of a second what it gave before.
        waiting = sa.text("SELECT variable_value FROM information_schema.global_status WHERE variable_name = 'INNODB_ROW_LOCK_CURRENT_WAITS'")
        wait_for(lambda: int(_scalar(engine, waiting)) == 1, seconds=60, what="archiving to wait")
        connection.commit()
        archived.result()
    found = old.archive.recipients(1, load(engine).archive or {}, [2])
    assert State(found[2].state) is State.DELIVERED
    assert old.totals().delivered == expected.delivered + 1
    engine.dispose()


def _scalar(engine: sa.Engine, query: sa.TextClause) -> Any:
    with engine.connect() as connection:
        return connection.execute(query).scalar_one()


def test_what_a_person_asks_for_does_not_wait_for_the_archive(old: Old) -> None:
    old.archive_it()
    folder = Path(old.settings.campaigns.archive)
    away = folder.rename(f"{folder}.away")
    pieces = [piece(Kind.UNSUBSCRIBE, 18), piece(Kind.BOUNCE_REPORT, 6)]
    assert old.apply(*pieces) == [Effect.ARCHIVE_AWAY] * 2
    assert (old.suppressed(18), old.suppressed(6), old.facts()) == ({("unsubscribe", "brand")}, set(), {})
    with pytest.raises(LedgerArchiveError, match="is not there"):
        why.of_campaign(old.engine, old.settings, address(6), "spring-sale", LATER)
    assert "is not there" in why.recent(old.engine, old.settings, address(6))[0].verdict
    away.rename(folder)
    assert old.apply(*pieces) == [Effect.NEW] * 2
    assert old.facts() == {counters.LATE_BOUNCE: 1, "unsubscribed": 1}


# --- room -----------------------------------------------------------------------------------------------------------


def test_rows_go_in_small_transactions_and_those_of_others_stay(engine: sa.Engine, settings: Settings) -> None:
    Path(settings.campaigns.archive).mkdir(parents=True)
    archived = make_campaign(engine, "Old", state="finished", finished_at=END)
    sending = make_campaign(engine, "New", state="sending")
    fill_ledger(engine, archived.id, {State.DELIVERED: 4_500, State.BOUNCED: 700})
    fill_ledger(engine, sending.id, {State.PENDING: 300})
    with sizes_of_transactions(engine, "DELETE") as sizes:
        archiving.archive_old(engine, settings, LATER)
    assert (sum(sizes), max(sizes)) == (5_200, ledger_archive.DELETED_AT_ONCE)
    with reading(engine) as connection:
        assert dict(connection.execute(sa.select(Delivery.campaign_id, sa.func.count()).group_by(Delivery.campaign_id)).tuples().all()) == {sending.id: 300}


@pytest.mark.server
def test_partitions_whose_campaigns_are_all_archived_are_dropped(mariadb: MariaDB, settings: Settings) -> None:
    Path(settings.campaigns.archive).mkdir(parents=True)
    engine = create_engine(mariadb.database())
    migrate.upgrade(engine)
    # Before the months of the partitions, so that those of events stay.
    first_of_month = dt.date(2026, 1, 1)

    def bounds(table: str = "deliveries") -> list[int]:
        with engine.connect() as connection:
            return partitions._bounds(connection, table)

    def drop() -> list[str]:
        return partitions.drop_archived(engine, first_of_month)

    def numbered(number: int, name: str, state: str) -> Campaign:
        campaign = make_campaign(engine, name, state=state, finished_at=END)
        transact(engine, lambda connection: connection.execute(sa.update(models.Campaign).where(models.Campaign.id == campaign.id).values(id=number)))
        return campaign

    numbered(3, "Old", "finished")
    numbered(5, "Draft", "draft")
    numbered(40, "Other", "finished")
    for number in (3, 40):
        fill_ledger(engine, number, {State.DELIVERED: 20})
    archiving.archive_old(engine, settings, LATER)
    assert bounds() == [32, 64, 96, 128]
    # The second block may still get campaigns, and the first has one that may be sent.
    transact(engine, lambda connection: connection.execute(sa.update(models.Campaign).where(models.Campaign.id == 5).values(state="cancelled")))
    # A row that nobody can account for.
    fill_ledger(engine, 4, {State.DELIVERED: 1})
    assert drop() == []
    transact(engine, lambda connection: connection.execute(sa.delete(Delivery).where(Delivery.campaign_id == 4)))
    with engine.connect() as connection:
        # Whoever reads the ledger is not waited for, and not harmed.
        connection.execute(sa.select(Delivery.contact_id)).all()
        assert drop() == []
    assert drop() == ["deliveries.c32"]
    assert drop() == []
    fill_ledger(engine, 6, {State.PENDING: 10})
    assert bounds() == [64, 96, 128]
    months = bounds("delivery_events")
    event = {"month": months[0], "id": 1, "occurred_at": NOW, "campaign_id": 4, "contact_id": 1, "attempt": 0, "kind": "deferred"}
    transact(engine, lambda connection: connection.execute(sa.insert(DeliveryEvent).values(event)))
    # Two months after the first partition's end: the first is empty, the second has a row, the third is of this month.
    first_of_month = dt.date(months[1] // 100, months[1] % 100, 1)
    with engine.connect() as connection:
        connection.execute(sa.select(DeliveryEvent.id)).all()
        assert drop() == [f"engagement_events.m{month}" for month in months[:2]]
    assert drop() == [f"delivery_events.m{months[0]}"]
    assert (bounds("delivery_events"), bounds("engagement_events")) == (months[1:], months[2:])
    transact(engine, lambda connection: connection.execute(sa.insert(DeliveryEvent).values(event | {"month": 202501, "id": 2})))
    engine.dispose()


# --- commands -------------------------------------------------------------------------------------------------------


def test_commands_show_what_is_archived(old: Old, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mail_pipelines.commands import context

    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", database_url)
    context.settings.cache_clear()
    asked = says("why", address(13), "--campaign", "spring-sale"), says("why", address(13))
    status = says("campaign", "status", "spring-sale")
    old.archive_it()
    assert (says("why", address(13), "--campaign", "spring-sale"), says("why", address(13))) == asked
    assert says("campaign", "status", "spring-sale") == status.replace("is finished", "is archived")
    assert "archived" in says("campaign", "show", "spring-sale")
    context.settings.cache_clear()
