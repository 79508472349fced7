"""Files as sources: formats, consent, conflicts, deletions. On both databases."""

from __future__ import annotations

import datetime as dt
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from mail_pipelines.contacts import consent, lookup
from mail_pipelines.contacts.addresses import address_hash
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Contact, ContactChange, ContactList, SourceContact, Suppression
from mail_pipelines.sources import kinds, landing, status
from mail_pipelines.sources.errors import GuardStopped, SourceError
from mail_pipelines.sources.running import Report
from tests.sources.conftest import Declare, contacts, subscribed

pytestmark = pytest.mark.slow
Sync = Callable[..., Report]
NOW = dt.datetime(2026, 11, 2, 9, 30, tzinfo=dt.UTC)
ROWS = [
    {"id": 1, "mail": "Ann@Example.test", "name": "Ann", "city": "Bonn", "orders": 3},
    {"id": 2, "mail": "bob@example.test", "name": "Bob", "city": None, "orders": 0},
    {"id": 3, "mail": "no address", "name": "X", "city": "Y", "orders": 1},
    {"id": 4, "mail": "cid@example.test", "name": "Cid", "city": "Köln", "orders": 12},
]


def write(folder: Path, rows: list[dict[str, Any]], kind: str = "jsonl") -> None:
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    path = folder / f"people.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        names = list(rows[0])
        path.write_text("\n".join([",".join(names), *(",".join("" if row[name] is None else str(row[name]) for name in names) for row in rows)]) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "drop"


@pytest.fixture
def source(declare: Declare, folder: Path) -> Callable[..., Any]:
    def declared(**given: Any) -> Any:
        return declare(kind="files", connection={"url": str(folder)}, contacts={"read": {"glob": "*"}, **given})

    return declared


def contact_id(engine: sa.Engine, email: str) -> int:
    with reading(engine) as connection:
        return lookup.contact_id_of(connection, email)


def leave(engine: sa.Engine, email: str, scope: str = "list", scope_id: int = 1) -> None:
    ids = [contact_id(engine, email)]
    transact(engine, lambda connection: consent.unsubscribe(connection, ids, scope=scope, scope_id=scope_id, now=NOW))  # type: ignore[arg-type]


def changes(engine: sa.Engine) -> int:
    with reading(engine) as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(ContactChange)).scalar_one()


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_file_becomes_typed_contacts_and_once_more_changes_nothing(engine: sa.Engine, folder: Path, source: Any, sync: Sync, kind: str) -> None:
    write(folder, ROWS, kind)
    report = sync(source())
    assert report.standing.counts == {"read": 4, "inserted": 3, "updated": 0, "unchanged": 0, "duplicates": 0, "deleted": 0}
    assert report.standing.rejected == {"address: it has no '@'": 1}
    assert report.reject_file is not None
    assert report.reject_file.read_text().splitlines() == ["id,reason", "3,address: it has no '@'"]
    assert contacts(engine) == {
        "ann@example.test": {"first_name": "Ann", "city": "Bonn", "orders": 3},
        "bob@example.test": {"first_name": "Bob", "orders": 0},
        "cid@example.test": {"first_name": "Cid", "city": "Köln", "orders": 12},
    }
    assert subscribed(engine) == set(contacts(engine))
    written = changes(engine)
    assert written == 3
    again = sync(source())
    assert {name: again.standing.counts[name] for name in ("inserted", "updated", "unchanged")} == {"inserted": 0, "updated": 0, "unchanged": 3}
    assert changes(engine) == written
    assert again.standing.run == 2
    assert again.standing.error is None


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_is_nested_is_reached_by_dots_and_numbers(engine: sa.Engine, folder: Path, source: Any, sync: Sync, kind: str) -> None:
    person = {"name": {"first": "Ann"}, "mails": [{"at": "ann@example.test"}, {"at": "other@example.test"}]}
    write(folder, [{"id": 1, **person}, {"id": 2, "name": None, "mails": []}], kind)
    report = sync(source(map={"id": "external_id", "mails.0.at": "email", "name.first": "first_name"}))
    assert contacts(engine) == {"ann@example.test": {"first_name": "Ann"}}
    assert report.standing.rejected == {"address: there is none": 1}


def test_nobody_who_left_is_subscribed_again(engine: sa.Engine, folder: Path, source: Any, sync: Sync) -> None:
    write(folder, ROWS)
    sync(source())
    leave(engine, "ann@example.test")
    leave(engine, "bob@example.test", "brand")
    transact(engine, lambda connection: consent.erase(connection, contact_id(engine, "cid@example.test"), now=NOW))
    write(folder, [{**row, "orders": 99} for row in ROWS])
    report = sync(source())
    assert subscribed(engine) == set()
    assert "cid@example.test" not in contacts(engine)
    assert report.standing.counts["updated"] == 2
    assert any("erased" in reason for reason in report.standing.rejected)
    with reading(engine) as connection:
        assert connection.execute(sa.select(sa.func.count()).where(SourceContact.address_hash == address_hash("cid@example.test"))).scalar_one() == 0


def test_only_who_opted_in_is_subscribed_and_the_evidence_is_kept(engine: sa.Engine, folder: Path, source: Any, sync: Sync) -> None:
    people = [
        {"id": 1, "mail": "yes@example.test", "news": True, "at": "2026-01-02T03:04:05Z"},
        {"id": 2, "mail": "no@example.test", "news": False, "at": None},
        {"id": 3, "mail": "silent@example.test", "news": None, "at": None},
    ]
    write(folder, people)
    mapping = {"id": "external_id", "mail": "email", "news": "opted_in", "at": "consent_at"}
    sync(source(map=mapping, consent={"subscribe": "opted_in", "evidence": "shop form 7"}))
    assert set(contacts(engine)) == {"yes@example.test", "no@example.test", "silent@example.test"}
    assert subscribed(engine) == {"yes@example.test"}
    with reading(engine) as connection:
        kept = dict(connection.execute(sa.select(Contact.address, Contact.consent)).tuples().all())
    assert kept["no@example.test"] is None
    evidence = kept["yes@example.test"]
    assert evidence is not None
    assert (evidence["source"], evidence["evidence"], evidence["at"]) == ("crm", "shop form 7", "2026-01-02T03:04:05Z")


def test_who_left_at_the_source_is_refused_whoever_subscribes_them_and_whatever_else_is_wrong(
    engine: sa.Engine, folder: Path, declare: Declare, source: Any, sync: Sync
) -> None:
    people: list[dict[str, Any]] = [{"id": number, "mail": f"p{number}@example.test", "out": None, "news": None, "orders": "1"} for number in range(1, 7)]
    write(folder, people)
    mapping = {"id": "external_id", "mail": "email", "out": "opted_out", "news": "opted_in", "orders": "orders"}
    chosen = {"map": mapping, "types": {"orders": "number"}, "consent": {"subscribe": "always", "left": ["Gone Away"]}}
    sync(source(**chosen))
    assert len(subscribed(engine)) == 6
    people[0] |= {"out": "true"}
    # Not taken over for another reason, and refused all the same.
    people[1] |= {"news": " gone away", "orders": "many"}
    people[2] |= {"out": "2026-01-02T03:04:05Z", "id": None}
    # Two records of one address, of which one says no; and somebody who is not known here.
    people += [people[3] | {"id": 10, "out": "yes"}, people[3] | {"id": 11, "mail": "new@example.test", "out": "1", "orders": "many"}]
    # No words of leaving.
    people[4] |= {"out": "no", "news": "perhaps"}
    write(folder, people)
    assert sum(sync(source(**chosen)).standing.rejected.values()) == 3
    assert subscribed(engine) == {"p5@example.test", "p6@example.test"}
    for person in people:
        person |= {"out": None, "news": "yes", "orders": "1"}
    people[2]["id"] = 3
    write(folder, people)
    sync(source(**chosen))
    assert "new@example.test" in contacts(engine)
    assert subscribed(engine) == {"p5@example.test", "p6@example.test"}
    # Nor does another source, which knows nothing of it.
    sync(declare("other", kind="files", connection={"url": str(folder)}, contacts={"read": {"glob": "*"}, "map": {"id": "external_id", "mail": "email"}}))
    assert subscribed(engine) == {"p5@example.test", "p6@example.test"}


def test_who_left_is_known_by_their_id_where_the_address_is_gone_or_somebody_elses(engine: sa.Engine, folder: Path, source: Any, sync: Sync) -> None:
    people = [{"id": number, "mail": f"p{number}@example.test", "out": None, "news": True} for number in range(1, 6)]
    write(folder, people)
    given = source(map={"id": "external_id", "mail": "email", "out": "opted_out", "news": "opted_in"}, consent={"subscribe": "opted_in"})
    sync(given)
    # Blanked with the refusal, as some services do; an address that another contact has; one that is new.
    for person, mail in zip(people, (None, "p5@example.test", "new@example.test"), strict=False):
        person |= {"mail": mail, "out": "yes"}
    # A row that has lost everything has not said that somebody left.
    people[3] |= {"mail": "", "news": False}
    write(folder, people)
    sync(given)
    assert subscribed(engine) == {"p4@example.test"}
    with reading(engine) as connection:
        suppressed = set(connection.execute(sa.select(Suppression.address_hash)).scalars())
    assert {address_hash(f"{name}@example.test") for name in ("p1", "p2", "new", "p5")} == suppressed


def test_a_changed_address_is_the_same_person_with_the_same_refusals(engine: sa.Engine, folder: Path, source: Any, sync: Sync) -> None:
    write(folder, ROWS)
    sync(source())
    ann = contact_id(engine, "ann@example.test")
    leave(engine, "ann@example.test")
    bob = contact_id(engine, "bob@example.test")
    write(folder, [{**ROWS[0], "mail": "ann.new@example.test"}, {**ROWS[1], "mail": "robert@example.test"}, *ROWS[2:]])
    sync(source())
    assert contact_id(engine, "ann.new@example.test") == ann
    assert contact_id(engine, "robert@example.test") == bob
    assert set(contacts(engine)) == {"ann.new@example.test", "robert@example.test", "cid@example.test"}
    assert subscribed(engine) == {"robert@example.test", "cid@example.test"}
    with reading(engine) as connection:
        reasons = connection.execute(sa.select(Suppression.reason).where(Suppression.address_hash == address_hash("ann.new@example.test"))).scalars().all()
    assert reasons == ["unsubscribe"]


def test_an_address_that_another_contact_has_is_linked_and_the_old_subscription_ends(engine: sa.Engine, folder: Path, source: Any, sync: Sync) -> None:
    write(folder, ROWS)
    sync(source())
    leave(engine, "ann@example.test")
    write(folder, [{**ROWS[0], "mail": "cid@example.test"}, *ROWS[1:3]])
    report = sync(source())
    # Cid's own record is gone, and the one that now says his address is of somebody who left.
    assert set(contacts(engine)) == {"ann@example.test", "bob@example.test", "cid@example.test"}
    assert "ann@example.test" not in subscribed(engine)
    assert report.standing.counts["updated"] == 1


@pytest.mark.parametrize("rule", ["theirs", "ours", "newest"])
def test_who_wins_is_the_fields_rule(engine: sa.Engine, folder: Path, source: Any, sync: Sync, rule: str) -> None:
    start = dt.datetime.now(dt.UTC) - dt.timedelta(days=2)
    rows = [{**row, "changed": start.isoformat()} for row in ROWS[:2]]
    mapping = {"id": "external_id", "mail": "email", "name": "first_name", "city": "city", "changed": "changed_at"}
    given = source(map=mapping, conflict={"default": rule})
    write(folder, rows)
    sync(given)
    # Ann is changed here, Bob there; Bob's city is new.
    ours = {"first_name": "Anna", "city": "Bonn"}
    ann = contact_id(engine, "ann@example.test")
    here = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=1)
    transact(engine, lambda connection: connection.execute(sa.update(Contact).where(Contact.id == ann).values(attributes=ours, updated_at=here)))
    write(folder, [rows[0], {**rows[1], "name": "Bobby", "city": "Ulm", "changed": (start + dt.timedelta(days=1)).isoformat()}])
    sync(given)
    found = {name: value["first_name"] for name, value in contacts(engine).items()}
    assert found == {"ann@example.test": "Ann" if rule == "theirs" else "Anna", "bob@example.test": "Bob" if rule == "ours" else "Bobby"}
    assert contacts(engine)["bob@example.test"]["city"] == "Ulm"
    if rule == "newest":
        # Changed on both sides: the later change wins, and an older version that comes again does not.
        later = (here + dt.timedelta(minutes=1)).isoformat()
        write(folder, [{**rows[0], "name": "Annie", "changed": later}, rows[1]])
        sync(given)
        assert contacts(engine)["ann@example.test"]["first_name"] == "Annie"
        assert contacts(engine)["bob@example.test"]["first_name"] == "Bobby"
        # Changed there while the last run was under way, its address too: nothing was changed here since.
        seen = start + dt.timedelta(days=1, minutes=1)
        write(folder, [rows[0], {**rows[1], "mail": "robert@example.test", "name": "Robert", "changed": seen.isoformat()}])
        sync(given)
        assert contacts(engine)["robert@example.test"]["first_name"] == "Robert"


def test_what_is_gone_ends_only_what_the_source_began_and_comes_back_unless_refused(engine: sa.Engine, folder: Path, source: Any, sync: Sync) -> None:
    people = [{"id": number, "mail": f"p{number}@example.test", "name": "P", "city": "C", "orders": 1} for number in range(30)]
    write(folder, people)
    given = source(deletions={"share": 0.1, "at_least": 0})
    sync(given)
    write(folder, people[3:])
    assert sync(given).ended == 3
    assert len(subscribed(engine)) == 27
    leave(engine, "p1@example.test", "brand")
    write(folder, people)
    sync(given)
    assert len(subscribed(engine)) == 29
    assert "p1@example.test" not in subscribed(engine)


def test_a_source_that_deletes_everything_stops_and_asks(engine: sa.Engine, folder: Path, source: Any, sync: Sync, home: Path) -> None:
    people = [{"id": number, "mail": f"p{number}@example.test", "name": "P", "city": "C", "orders": 1} for number in range(30)]
    write(folder, people)
    given = source()
    sync(given)
    write(folder, people[:2])
    for _ in range(2):
        with pytest.raises(GuardStopped, match=r"28 of 30 records are gone.*--accept-deletions"):
            sync(given)
    assert len(subscribed(engine)) == 30
    standing = status.read(engine, "crm", "contacts")
    assert standing.missing == 28
    assert "28 of 30" in (standing.error or "")
    report = sync(given, accept_deletions=True)
    assert report.ended == 28
    assert subscribed(engine) == {"p0@example.test", "p1@example.test"}
    assert report.standing.error is None


def test_a_small_source_that_deletes_everything_asks_too(engine: sa.Engine, folder: Path, source: Any, sync: Sync) -> None:
    write(folder, ROWS[:2], "csv")
    given = source(types={"orders": "number"})
    sync(given)
    (folder / "people.csv").write_text("id,mail,name,city,orders\n")
    with pytest.raises(GuardStopped, match="2 of 2 records are gone"):
        sync(given)
    assert len(subscribed(engine)) == 2
    assert sync(given, accept_deletions=True).ended == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "1,ann@example.test,Ann\n", "has no header"),
        ("a.csv", 'id,mail\n1,ann@example.test\n2,"b"ob@example.test\n', "no readable csv in line 3 or before"),
        ("a.jsonl", '{"id": 1, "mail": "ann@example.test"}\n3\n', "line 2 is no JSON object"),
        ("a.json", '[{"id": 1, "mail": "ann@example.test"}]\n', "line 1 is no JSON object"),
        ("a.ndjson", '{"id": 1, "mail": "ann@exam', "line 1 is no JSON object"),
    ],
)
def test_a_file_of_another_form_is_named_and_nobody_in_it(folder: Path, source: Any, name: str, content: str, words: str) -> None:
    folder.mkdir()
    (folder / name).write_text(content)
    declared = source(map={"id": "external_id", "mail": "email"})
    with pytest.raises(SourceError, match=words) as caught:
        landing.check(declared, declared.contacts)
    assert "ann@" not in str(caught.value)


def test_files_in_a_store_of_objects(engine: sa.Engine, declare: Declare, sync: Sync) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/exports/2026/a.csv", b"id;mail\n1;ann@example.test\n2;bob@example.test\n")
    store.pipe("/exports/2026/b.csv.gz", gzip.compress(b"id;mail\n3;cid@example.test\n"))
    try:
        contacts_ = {"read": {"glob": "*/*.csv*"}, "map": {"id": "external_id", "mail": "email"}}
        report = sync(declare(kind="files", connection={"url": "memory://exports"}, contacts=contacts_))
    finally:
        store.rm("/exports", recursive=True)
    assert report.standing.counts["inserted"] == 3
    assert subscribed(engine) == {"ann@example.test", "bob@example.test", "cid@example.test"}
    with pytest.raises(SourceError, match="nowhere:// cannot be read here: Protocol not known"):
        sync(declare(kind="files", connection={"url": "nowhere://exports"}, contacts=contacts_))


def test_a_file_that_is_still_written_is_not_merged(folder: Path) -> None:
    folder.mkdir()
    (folder / "people.csv").write_text("id,mail\n" + "1,p@example.test\n" * 10_001)
    (folder / ".people.csv.x7").write_text("half a")
    pages = kinds.rows("files", {"url": str(folder)}, {"glob": "*"}, kinds.Wanted(("id",), None, None, kinds.secret))
    assert len(next(pages)) == 10_000
    with (folder / "people.csv").open("a") as file:
        file.write("2,q@exam")
    with pytest.raises(SourceError, match=r"^people\.csv was changed or removed while it was read; nothing of this run was merged"):
        list(pages)


def test_no_file_at_all_is_an_error_and_no_deletion(engine: sa.Engine, folder: Path, source: Any, sync: Sync) -> None:
    write(folder, ROWS)
    sync(source())
    (folder / "people.jsonl").unlink()
    with pytest.raises(SourceError, match="no file fits"):
        sync(source())
    assert len(subscribed(engine)) == 3


def test_duplicates_in_one_page_are_one_contact(engine: sa.Engine, folder: Path, source: Any, sync: Sync) -> None:
    write(folder, [ROWS[0], {**ROWS[0], "mail": "ann2@example.test"}, ROWS[1], {**ROWS[1], "id": 9, "city": "Ulm"}])
    report = sync(source())
    assert set(contacts(engine)) == {"ann2@example.test", "bob@example.test"}
    assert contacts(engine)["bob@example.test"]["city"] == "Ulm"
    assert report.standing.counts["duplicates"] == 2
    assert report.standing.counts["inserted"] == 2
    with reading(engine) as connection:
        assert set(connection.execute(sa.select(SourceContact.external_id)).scalars()) == {"1", "2", "9"}


def test_suppressions_are_taken_and_end_subscriptions(engine: sa.Engine, folder: Path, declare: Declare, sync: Sync) -> None:
    write(folder, ROWS)
    given = declare(
        kind="files",
        connection={"url": str(folder)},
        contacts={"read": {"glob": "people*"}},
        suppressions={"read": {"glob": "left*"}, "map": {"who": "email", "why": "reason"}, "scope": "list News"},
    )
    sync(given)
    (folder / "left.csv").write_text("who,why\nann@example.test,unsubscribe\nstranger@example.test,complaint\nnobody,\n")
    for added in (2, 0):
        report = sync(given, section="suppressions")
        assert (report.standing.counts["read"], report.standing.counts["inserted"]) == (3, added)
        assert sum(report.standing.rejected.values()) == 1
    assert subscribed(engine) == {"bob@example.test", "cid@example.test"}
    with reading(engine) as connection:
        list_id = connection.execute(sa.select(ContactList.id)).scalar_one()
        found = set(connection.execute(sa.select(Suppression.reason, Suppression.scope_kind, Suppression.scope_id)).tuples())
    assert found == {("unsubscribe", "list", list_id), ("complaint", "list", list_id)}
