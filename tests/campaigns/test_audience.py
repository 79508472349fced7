"""The freeze: exactly those who match and may be mailed, once, whatever is killed or changes meanwhile."""

from __future__ import annotations

import datetime as dt
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from mail_pipelines.campaigns import audience, exclusion, lifecycle, manifest, progress, scheduling, shards, states
from mail_pipelines.campaigns.campaign import Campaign, CampaignError, Unsubscribe
from mail_pipelines.campaigns.manifest import ManifestError
from mail_pipelines.campaigns.shards import shard_of
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.config import Settings
from mail_pipelines.contacts import consent
from mail_pipelines.database import models
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Contact, Delivery, State
from tests.campaigns.parts import (
    NOW,
    add_contacts,
    contact_rows,
    counters_equal_ledger,
    ledger_states,
    load,
    make_campaign,
    make_people,
    refresh_snapshots,
    save_segment,
)


def scheduled(engine: sa.Engine, name: str = "Spring sale", **changes: Any) -> Campaign:
    return make_campaign(engine, name, state="scheduled", start_at=NOW, **changes)


def rows(engine: sa.Engine, campaign: Campaign) -> list[Any]:
    query = sa.select(Delivery.__table__).where(Delivery.campaign_id == campaign.id).order_by(Delivery.contact_id)
    with reading(engine) as connection:
        return list(connection.execute(query))


def recipients(engine: sa.Engine, campaign: Campaign) -> set[int]:
    return {row.contact_id for row in rows(engine, campaign)}


def of_manifest(settings: Settings, campaign: Campaign) -> set[int]:
    assert campaign.audience_manifest is not None
    return set(pq.read_table(manifest.folder(settings) / campaign.audience_manifest["file"])["contact_id"].to_pylist())


def never_engaged(contact_id: int) -> int:
    """The place of somebody who was never engaged."""
    return (9999 << 16) + contact_id // 1024


def test_everybody_who_matches_becomes_one_pending_row(engine: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "RECIPIENTS_PER_SHARD", 500)
    make_people(engine, settings, 1100)
    campaign = scheduled(engine)
    built = audience.build(engine, settings, campaign.key, NOW)
    assert (built.built, built.matched, built.audience, built.excluded) == (True, 1100, 1100, {})
    assert built.campaign.state is CampaignState.SENDING
    assert built.campaign.started_at == NOW
    assert built.campaign.definition.expire_at == NOW + dt.timedelta(hours=48)
    assert built.campaign.shards == 2
    found = rows(engine, campaign)
    expected = {row["id"]: row for row in contact_rows(range(1, 1101))}
    assert len(found) == 1100
    for row in found:
        contact = expected[row.contact_id]
        assert (row.address_hash, row.provider, row.shard) == (contact["address_hash"], contact["provider"], shard_of(row.contact_id, 2))
        assert (row.state, row.attempt, row.version_id, row.server_id, row.claim_id, row.variant) == (0, 0, None, None, None, 0)
        assert row.sort_key == never_engaged(row.contact_id)
    assert counters_equal_ledger(engine, campaign.id)
    with reading(engine) as connection:
        assert progress.totals(connection, built.campaign).check().pending == 1100


def test_overlapping_segments_give_one_row_and_excluded_segments_none(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 100)
    save_segment(engine, "low", {"field": "number", "op": "<=", "value": 60})
    save_segment(engine, "high", {"field": "number", "op": ">", "value": 40})
    save_segment(engine, "first", {"field": "number", "op": "<=", "value": 10})
    campaign = scheduled(engine, include=("low", "high", "everybody"), exclude=("first",))
    assert audience.build(engine, settings, campaign.key, NOW).audience == 90
    assert recipients(engine, campaign) == set(range(11, 101))


def test_who_engages_goes_first(engine: sa.Engine, settings: Settings) -> None:
    opened = {"month": 202602, "id": 1, "occurred_at": NOW - dt.timedelta(days=3), "recorded_at": NOW, "campaign_id": 9, "contact_id": 5, "kind": "open"}
    transact(engine, lambda connection: connection.execute(sa.insert(models.EngagementEvent).values(opened | {"machine": False})))
    make_people(engine, settings, 10)
    campaign = scheduled(engine)
    audience.build(engine, settings, campaign.key, NOW)
    places = {row.contact_id: row.sort_key for row in rows(engine, campaign)}
    assert places.pop(5) == 3 << 16
    assert places == {contact_id: never_engaged(contact_id) for contact_id in places}


def test_consent_is_asked_of_the_database_after_the_snapshot_and_counted_by_reason(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 100)
    with reading(engine) as connection:
        hashes = dict(connection.execute(sa.select(Contact.id, Contact.address_hash)).all())

    def change(connection: sa.Connection) -> None:
        news = {"id": 1, "key": "news", "name": "News", "brand_id": 1, "created_at": NOW}
        connection.execute(sa.insert(models.ContactList), [news, news | {"id": 2, "key": "other"}])
        connection.execute(sa.insert(models.Brand).values(id=2, key="shop", name="Shop", created_at=NOW))
        consent.suppress(connection, [hashes[1], hashes[2]], reason="bounce", now=NOW)
        consent.suppress(connection, [hashes[4]], reason="complaint", scope_kind="brand", scope_id=1, now=NOW)
        consent.suppress(connection, [hashes[5]], reason="manual", scope_kind="list", scope_id=1, now=NOW)
        consent.suppress(connection, [hashes[6]], reason="manual", scope_kind="brand", scope_id=2, now=NOW)
        consent.suppress(connection, [hashes[7]], reason="manual", scope_kind="list", scope_id=2, now=NOW)
        consent.erase(connection, 9, now=NOW)
        left = {"contact_id": 10, "list_id": 1, "subscribed": False, "source": "import", "changed_at": NOW}
        connection.execute(sa.insert(models.Subscription), [left, left | {"contact_id": 11, "list_id": 2}, left | {"contact_id": 12, "subscribed": True}])
        consent.suppress_domain(connection, "web.de", reason="manual", now=NOW)

    transact(engine, change)
    in_domain = {row["id"] for row in contact_rows(range(1, 101)) if row["domain"] == "web.de"}
    everybody = set(range(1, 101))
    by_list = scheduled(engine, "by list", unsubscribe=Unsubscribe.LIST, list="news")
    built = audience.build(engine, settings, "by-list", NOW)
    assert recipients(engine, by_list) == everybody - {1, 2, 4, 5, 9, 10} - in_domain
    assert built.excluded == {"bounce": 2, "complaint": 1, "manual": 1 + len(in_domain), "missing": 1, "unsubscribe": 1}
    assert built.matched == built.audience + sum(built.excluded.values()) == 100
    by_brand = scheduled(engine, "by brand")
    audience.build(engine, settings, "by-brand", NOW)
    assert recipients(engine, by_brand) == everybody - {1, 2, 4, 9} - in_domain


def test_address_and_provider_are_the_databases_not_the_snapshots(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 3)
    moved = contact_rows([700])[0] | {"id": 2}
    transact(engine, lambda connection: connection.execute(sa.update(Contact).where(Contact.id == 2).values(moved)))
    campaign = scheduled(engine)
    audience.build(engine, settings, campaign.key, NOW)
    assert [(row.address_hash, row.provider) for row in rows(engine, campaign) if row.contact_id == 2] == [(moved["address_hash"], moved["provider"])]


def test_an_address_that_passes_to_another_contact_meanwhile_is_mailed_once(engine: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are read one after the other; between them contact 1 gives its address to contact 4."""
    make_people(engine, settings, 4)
    monkeypatch.setattr(exclusion, "_CHUNK_ROWS", 2)
    campaign = scheduled(engine)
    passed = contact_rows([1])[0]
    swapped = threading.Event()
    look = exclusion._look

    def swap(connection: sa.Connection) -> None:
        connection.execute(sa.update(Contact).where(Contact.id == 1).values(contact_rows([900])[0] | {"id": 1}))
        connection.execute(sa.update(Contact).where(Contact.id == 4).values(passed | {"id": 4}))

    def look_and_swap(engine: sa.Engine, query: Any, chunk: pa.Table) -> Any:
        if chunk["contact_id"][0].as_py() != 1:
            assert swapped.wait(120)
            return look(engine, query, chunk)
        found = look(engine, query, chunk)
        transact(engine, swap)
        swapped.set()
        return found

    monkeypatch.setattr(exclusion, "_look", look_and_swap)
    allowed = exclusion.allowed(engine, campaign, members_table(4), lambda _: None)
    assert allowed.excluded == {"duplicate": 1}
    assert allowed.members["contact_id"].to_pylist() == [1, 2, 3]


def members_table(count: int) -> pa.Table:
    return pa.table({"contact_id": pa.array(range(1, count + 1), pa.int64()), "engagement_rank": pa.array([0] * count, pa.int32())})


def test_building_again_in_any_state_reports_the_numbers_and_writes_nothing(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 50)
    campaign = scheduled(engine)
    first = audience.build(engine, settings, campaign.key, NOW)
    add_contacts(engine, 51, 80)
    refresh_snapshots(engine, settings, NOW + dt.timedelta(days=1))
    before = rows(engine, campaign)
    for state in ("sending", "paused", "finished", "cancelled"):
        transact(engine, lambda connection, state=state: connection.execute(sa.update(models.Campaign).values(state=state)))
        frozen = load(engine)
        again = audience.build(engine, settings, campaign.key, NOW + dt.timedelta(days=2))
        assert (again.built, again.reason) == (False, f"it is {state}")
        assert (again.matched, again.audience, again.excluded) == (first.matched, first.audience, first.excluded)
        assert load(engine) == frozen
    assert rows(engine, campaign) == before


def test_nothing_is_frozen_before_its_time(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 5)
    make_campaign(engine, "draft", start_at=NOW)
    make_campaign(engine, "early", state="scheduled", start_at=NOW + dt.timedelta(hours=1))
    make_campaign(engine, "held", state="scheduled", start_at=NOW, held="bounce rate 12 %")
    for key, reason in [("draft", "it is draft"), ("early", "it starts at 2026-03-02T10:00:00+00:00"), ("held", "the campaign is held: bounce rate 12 %")]:
        before = load(engine, key)
        result = audience.build(engine, settings, key, NOW)
        assert (result.built, result.reason, result.audience) == (False, reason, 0)
        assert load(engine, key) == before
        assert rows(engine, before) == []


def test_an_audience_that_is_ready_too_late_is_held_until_it_is_resumed(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 5)
    for name, delay, held in [("in time", dt.timedelta(hours=6), False), ("late", dt.timedelta(hours=6, minutes=30), True)]:
        campaign = scheduled(engine, name)
        built = audience.build(engine, settings, campaign.key, NOW + delay).campaign
        assert built.state is CampaignState.SENDING
        assert (built.hold is not None) == held
    assert str(load(engine, "late").hold) == "the campaign is held: ready 6.5 h after its start: check that it is still wanted, then resume it"
    assert scheduling.resume(engine, "late", NOW, "tester").hold is None


def test_too_little_disk_is_an_error_and_the_campaign_can_be_built_later(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 5)
    campaign = scheduled(engine)
    greedy = settings.model_copy(update={"snapshots": settings.snapshots.model_copy(update={"min_free_mb": 10**9})})
    with pytest.raises(ManifestError, match=r"MB free disk, the freeze wants 1000000000 MB \(snapshots.min_free_mb\): make room and build again"):
        audience.build(engine, greedy, campaign.key, NOW)
    assert audience.build(engine, settings, campaign.key, NOW).audience == 5


def test_a_disk_that_fills_up_while_writing_is_an_error_and_leaves_nothing(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 5)
    campaign = scheduled(engine)
    place = manifest.folder(settings)
    place.parent.mkdir(parents=True, exist_ok=True)
    # The folder of the manifests leads to a device without a byte of space.
    table = manifest.table(
        pa.table(
            {
                "contact_id": pa.array([1], pa.int64()),
                "engagement_rank": pa.array([0], pa.int32()),
                "address_hash": pa.array([b"x" * 16], pa.binary(16)),
                "provider": ["other"],
            }
        )
    )
    place.symlink_to("/proc/self")
    with pytest.raises(ManifestError, match="cannot be written"):
        manifest.write(settings, campaign.id, table)
    place.unlink()
    assert audience.build(engine, settings, campaign.key, NOW).audience == 5


def interrupted(engine: sa.Engine, settings: Settings, key: str, step: str) -> None:
    """Run the freeze up to the first report of `step`, then stop it."""

    def stop(reached: str, _done: int, _total: int) -> None:
        if reached == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audience.build(engine, settings, key, NOW, stop)


def test_a_manifest_that_is_gone_or_changed_is_never_replaced_by_a_new_one(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 5)
    campaign = scheduled(engine)
    interrupted(engine, settings, campaign.key, "load ledger")
    recorded = load(engine).audience_manifest
    assert recorded is not None
    path = manifest.folder(settings) / recorded["file"]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(ManifestError, match="sha256 differs"):
        audience.build(engine, settings, campaign.key, NOW)
    path.unlink()
    with pytest.raises(ManifestError, match="missing"):
        audience.build(engine, settings, campaign.key, NOW)
    assert load(engine).state is CampaignState.BUILDING
    path.write_bytes(content)
    assert audience.build(engine, settings, campaign.key, NOW).audience == 5


def test_a_ledger_with_other_rows_than_the_manifest_is_not_opened(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 5)
    campaign = scheduled(engine)
    stray = {"campaign_id": campaign.id, "contact_id": 99, "address_hash": b"9" * 16, "shard": 0, "provider": "other", "state": 0, "sort_key": 0, "attempt": 0}
    transact(engine, lambda connection: connection.execute(sa.insert(Delivery).values(stray)))
    with pytest.raises(CampaignError, match="the ledger has 6 rows of campaign spring-sale, its manifest 5"):
        audience.build(engine, settings, campaign.key, NOW)
    assert load(engine).state is CampaignState.BUILDING


def test_a_campaign_cancelled_while_it_is_loaded_stays_cancelled_and_its_sums_hold(
    engine: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_people(engine, settings, 200)
    monkeypatch.setattr(manifest, "CHUNK_ROWS", 10)
    campaign = scheduled(engine)

    def cancel(step: str, done: int, _total: int) -> None:
        if step == "load ledger" and done == 20:
            lifecycle.cancel(engine, campaign.key, NOW)

    result = audience.build(engine, settings, campaign.key, NOW, cancel)
    assert (result.built, result.reason) == (False, "it is cancelled")
    # What had begun when it was cancelled is in, the rest is not.
    assert 20 <= result.audience < 100
    assert (result.matched, result.excluded) == (200, {"cancelled": 200 - result.audience})
    assert ledger_states(engine, campaign.id) == {State.CANCELLED: result.audience}
    with reading(engine) as connection:
        assert progress.totals(connection, load(engine)).check().cancelled == result.audience


def test_a_campaign_cancelled_before_its_manifest_stays_empty(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 5)
    campaign = scheduled(engine)

    def cancel(step: str, _done: int, _total: int) -> None:
        if step == "write manifest":
            lifecycle.cancel(engine, campaign.key, NOW)

    result = audience.build(engine, settings, campaign.key, NOW, cancel)
    assert (result.built, result.reason, result.audience) == (False, "it is cancelled", 0)
    assert rows(engine, campaign) == []


def test_a_hold_while_it_is_loaded_keeps_its_reason(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 5)
    campaign = scheduled(engine)

    def hold(step: str, _done: int, _total: int) -> None:
        if step == "write manifest":
            transact(engine, lambda connection: states.hold(connection, campaign.id, "bounce rate 12 %", NOW))

    built = audience.build(engine, settings, campaign.key, NOW, hold)
    assert (built.campaign.state, str(built.campaign.hold)) == (CampaignState.SENDING, "the campaign is held: bounce rate 12 %")


def test_two_freezes_at_once_make_one_audience(engine: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second freeze, on a newer snapshot, runs to its end while the first is between two chunks."""
    make_people(engine, settings, 50)
    monkeypatch.setattr(manifest, "CHUNK_ROWS", 10)
    campaign = scheduled(engine)
    second: list[audience.Audience] = []

    def overtake(step: str, done: int, _total: int) -> None:
        if step == "load ledger" and done == 20 and not second:
            add_contacts(engine, 51, 60)
            refresh_snapshots(engine, settings, NOW + dt.timedelta(hours=1))
            second.append(audience.build(engine, settings, campaign.key, NOW))

    first = audience.build(engine, settings, campaign.key, NOW, overtake)
    assert (second[0].built, first.built) == (True, False)
    assert recipients(engine, campaign) == set(range(1, 51))
    assert counters_equal_ledger(engine, campaign.id)


def test_of_two_manifests_the_first_recorded_counts_and_the_other_is_removed(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 20)
    campaign = scheduled(engine)

    def overtake(step: str, _done: int, _total: int) -> None:
        if step == "write manifest":
            add_contacts(engine, 21, 30)
            refresh_snapshots(engine, settings, NOW + dt.timedelta(hours=1))
            interrupted(engine, settings, campaign.key, "load ledger")

    built = audience.build(engine, settings, campaign.key, NOW, overtake)
    assert built.audience == 30
    assert recipients(engine, campaign) == set(range(1, 31)) == of_manifest(settings, built.campaign)
    assert [path.name for path in manifest.folder(settings).iterdir()] == [built.campaign.audience_manifest["file"]]


def test_two_freezes_side_by_side_load_every_chunk_once(engine: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    make_people(engine, settings, 300)
    monkeypatch.setattr(manifest, "CHUNK_ROWS", 10)
    campaign = scheduled(engine)
    interrupted(engine, settings, campaign.key, "load ledger")
    with ThreadPoolExecutor(2) as freezes:
        results = list(freezes.map(lambda _number: audience.build(engine, settings, campaign.key, NOW), range(2)))
    assert sum(result.built for result in results) == 1
    assert {result.audience for result in results} == {300}
    assert recipients(engine, campaign) == set(range(1, 301))
    assert counters_equal_ledger(engine, campaign.id)


def test_a_transaction_loads_at_most_ten_thousand_rows(settings: Settings) -> None:
    count = 25_000
    hashes = pa.array([number.to_bytes(16, "big") for number in range(count)], pa.binary(16))
    allowed = pa.table({"contact_id": pa.array(range(count), pa.int64()), "engagement_rank": pa.array([0] * count, pa.int32()), "address_hash": hashes})
    rows = manifest.table(allowed.append_column("provider", pa.array(["other"] * count)))
    manifest.require_space(settings)
    with manifest.open_file(settings, "x", manifest.write(settings, 1, rows)) as file:
        assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [10_000, 10_000, 5_000]


def test_an_empty_audience_is_frozen_and_finishes(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 5)
    save_segment(engine, "nobody", {"field": "number", "op": ">", "value": 100})
    campaign = scheduled(engine, include=("nobody",))
    built = audience.build(engine, settings, campaign.key, NOW)
    assert (built.built, built.audience, built.campaign.shards) == (True, 0, 1)
    assert lifecycle.finish_if_done(engine, campaign.id, NOW)


@pytest.mark.slow
def test_a_freeze_killed_anywhere_and_run_again_on_newer_snapshots_is_one_freeze(engine: sa.Engine, settings: Settings, database_url: str) -> None:
    make_people(engine, settings, 60)
    campaign = scheduled(engine)
    killed = 0
    with subprocess.Popen(
        [sys.executable, "-m", "tests.campaigns.freezes", database_url, campaign.key], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as freezes:
        assert freezes.stdin is not None
        assert freezes.stdout is not None
        chance = random.Random(11)
        first_manifest = None
        while load(engine).state is not CampaignState.SENDING:
            if killed % 4 == 0:
                add_contacts(engine, 61 + killed, 64 + killed)
                refresh_snapshots(engine, settings, NOW + dt.timedelta(minutes=killed))
            # Ever later until there is a manifest, then somewhere in the loading.
            kill_at = 2 + 3 * killed if first_manifest is None else chance.randint(8, 36) if killed < 14 else 10_000
            print(kill_at, file=freezes.stdin, flush=True)
            assert freezes.stdout.readline().strip() in ("killed", "ended")
            killed += 1
            found = load(engine)
            first_manifest = first_manifest or found.audience_manifest
            assert found.audience_manifest == first_manifest
            assert counters_equal_ledger(engine, campaign.id)
        freezes.stdin.close()
    assert killed >= 7
    assert first_manifest is not None
    add_contacts(engine, 1000, 1001)
    refresh_snapshots(engine, settings, NOW + dt.timedelta(hours=1))
    assert audience.build(engine, settings, campaign.key, NOW).built is False
    # The manifest is of an early snapshot; nobody who came later is in.
    audience_size = first_manifest["rows"]
    assert recipients(engine, campaign) == set(range(1, audience_size + 1)) == of_manifest(settings, load(engine))
    assert [path.name for path in manifest.folder(settings).iterdir()] == [first_manifest["file"]]
    with reading(engine) as connection:
        assert progress.totals(connection, load(engine)).check().pending == audience_size
