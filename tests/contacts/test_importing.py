"""Import: typed, streamed, idempotent; bad rows are named and left out; consent is never touched. On both databases."""

from __future__ import annotations

import csv
import datetime as dt
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mail_pipelines.contacts import consent, fields
from mail_pipelines.contacts.addresses import AddressError, address_hash, parse
from mail_pipelines.contacts.fields import FieldError
from mail_pipelines.contacts.files import ContactFileError
from mail_pipelines.contacts.importing import ERASED, ImportReport, import_file
from mail_pipelines.database.engine import create_engine, reading, transact
from mail_pipelines.database.models import Contact, ContactChange, ContactList, Field, Subscription
from mail_pipelines.keys import InvalidKey
from tests.contacts.conftest import NOW

LATER = NOW + dt.timedelta(days=1)


def write(folder: Path, text: str | bytes, name: str = "people.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def run(engine: sa.Engine, path: Path, **options: Any) -> ImportReport:
    return import_file(engine, path, **{"list_name": "News", "now": NOW, **options})


def attributes(engine: sa.Engine) -> dict[str, dict[str, Any]]:
    with reading(engine) as connection:
        return {row.address: row.attributes for row in connection.execute(sa.select(Contact.address, Contact.attributes))}


def subscriptions(engine: sa.Engine) -> dict[tuple[str, str], bool]:
    query = sa.select(Contact.address, ContactList.key, Subscription.subscribed).join_from(Contact, Subscription, Subscription.contact_id == Contact.id)
    with reading(engine) as connection:
        rows = connection.execute(query.join(ContactList, ContactList.id == Subscription.list_id)).all()
    return {(row.address, row.key): row.subscribed for row in rows}


def changed(engine: sa.Engine) -> list[str]:
    with reading(engine) as connection:
        query = sa.select(Contact.address).join(ContactChange, ContactChange.contact_id == Contact.id).order_by(ContactChange.seq, Contact.address)
        return sorted(connection.execute(query).scalars())


def forget_changes(engine: sa.Engine) -> None:
    transact(engine, lambda connection: connection.execute(sa.delete(ContactChange)))


def rejects(report: ImportReport) -> dict[int, str]:
    assert report.reject_file is not None
    with report.reject_file.open(encoding="utf-8", newline="") as file:
        return {int(row["line"]): row["reason"] for row in csv.DictReader(file)}


def test_csv_becomes_typed_contacts_of_a_list(engine: sa.Engine, tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "\ufeffE-Mail;Vorname;Orders;VIP;Birthday;Seen at;zip;Note\r\n"
        'Ann@Example.test;Zoë;12;yes;1980-02-29;2026-01-02 03:04;01234;"a ""b"" \\ \n c"\r\n'
        " bob@bücher.test ;;3.5;no;;2026-01-02T03:04:05+02:00;99999;\r\n",
    )
    report = run(engine, path, mapping={"Vorname": "first_name"})
    assert report == ImportReport("news", 2, 2, 0, 0, 0, 0, None)
    assert attributes(engine) == {
        "ann@example.test": {
            "first_name": "Zoë",
            "orders": 12,
            "vip": True,
            "birthday": "1980-02-29",
            "seen_at": "2026-01-02T03:04:00Z",
            "zip": "01234",
            "note": 'a "b" \\ \n c',
        },
        "bob@xn--bcher-kva.test": {"orders": 3.5, "vip": False, "seen_at": "2026-01-02T01:04:05Z", "zip": "99999"},
    }
    with reading(engine) as connection:
        types = {row.key: row.type for row in connection.execute(sa.select(Field.key, Field.type))}
        ann = connection.execute(sa.select(Contact).where(Contact.address == "ann@example.test")).one()
    assert types == {
        "first_name": "text",
        "orders": "number",
        "vip": "boolean",
        "birthday": "date",
        "seen_at": "datetime",
        "zip": "text",
        "note": "text",
    }
    assert (ann.email, ann.domain, ann.provider, ann.address_hash) == ("Ann@Example.test", "example.test", "other", address_hash("ann@example.test"))
    assert (ann.created_at, ann.updated_at, ann.tracking_allowed) == (NOW, NOW, True)
    assert set(subscriptions(engine).values()) == {True}
    assert changed(engine) == ["ann@example.test", "bob@xn--bcher-kva.test"]


def test_parquet_brings_its_types(engine: sa.Engine, tmp_path: Path) -> None:
    berlin = pa.array([dt.datetime(2026, 1, 2, 2, 4, tzinfo=dt.UTC), None], pa.timestamp("ms", "Europe/Berlin"))
    table = pa.table(
        {
            "mail": ["ann@google.test", "nobody"],
            "name": pa.array(["Zoë", "x"]).dictionary_encode(),
            "orders": pa.array([2.0, float("nan")]),
            "share": pa.array([0.125, 1.0]),
            "vip": [True, None],
            "birthday": [dt.date(1980, 1, 31), None],
            "at": berlin,
            "tags": [["a"], ["b"]],
        }
    )
    path = tmp_path / "people.parquet"
    pq.write_table(table, path)
    with pytest.raises(ContactFileError, match=r"'tags' is of type list<.*leave it out with --map tags="):
        run(engine, path)
    report = run(engine, path, mapping={"tags": ""})
    assert (report.inserted, report.rejected) == (1, 1)
    assert rejects(report) == {2: "address: it has no '@'"}
    assert attributes(engine) == {
        "ann@google.test": {"name": "Zoë", "orders": 2, "share": 0.125, "vip": True, "birthday": "1980-01-31", "at": "2026-01-02T02:04:00Z"}
    }
    with reading(engine) as connection:
        assert connection.execute(sa.select(Contact.provider)).scalars().all() == ["google"]
        assert fields.declared(connection)["at"] == "datetime"


def test_bad_rows_are_named_and_the_rest_goes_in(engine: sa.Engine, tmp_path: Path) -> None:
    path = write(
        tmp_path,
        b"email,name,orders\n"
        b"good1@example.test,An,1\n"  # 2
        b"short@example.test,An\n"  # 3
        b"long@example.test,An,1,2\n"  # 4
        b"latin@example.test,M\xfcller,1\n"  # 5
        b"nul@example.test,A\x00n,1\n"  # 6
        b"\n"
        b"bad address,An,1\n"  # 8
        b",An,many\n"  # 9
        b"few@example.test,An,few\n"  # 10
        b'good2@example.test,"An\nna",2\n'  # 11 and 12
        b'open@example.test,"An,1\n'  # 13
        b"good3@example.test,An,3\n"  # 14
        b'"odd"@example.test,An,3\n'  # 15
        b'good4@example.test,"An",4',  # 16, no newline at the end
    )
    report = run(engine, path, types={"orders": "number"})
    found = rejects(report)
    assert set(attributes(engine)) == {f"good{number}@example.test" for number in (1, 2, 3, 4)}
    assert found == {
        3: "has 2 values, the header has 3",
        4: "has 4 values, the header has 3",
        5: "is no text in UTF-8",
        6: "holds a NUL character",
        8: "address: it has no '@'",
        9: "address: there is none; column 'orders': not a number (like 12 or -3.5)",
        10: "column 'orders': not a number (like 12 or -3.5)",
        13: "a quote is opened that never closes properly",
        15: found[15],
    }
    assert found[15].startswith("is no CSV: ")
    assert (report.read, report.inserted, report.rejected) == (13, 4, 9)
    assert report.reject_file == tmp_path / "people.csv.rejected.csv"
    # Mended and imported again, no reject file of the past is left to mislead.
    assert run(engine, write(tmp_path, "email,name,orders\nshort@example.test,An,1\n")).reject_file is None
    assert not (tmp_path / "people.csv.rejected.csv").exists()


def test_a_file_that_cannot_be_used_says_why_and_changes_nothing(engine: sa.Engine, tmp_path: Path) -> None:
    def refused(error: type[Exception], words: str, text: str | bytes, name: str = "people.csv", **options: Any) -> None:
        with pytest.raises(error, match=words):
            run(engine, write(tmp_path, text, name), **options)

    good = "email,first_name\nann@example.test,Ann\n"
    refused(ContactFileError, r"people\.csv is empty", "")
    refused(ContactFileError, r"people\.csv is empty", "\n \n")
    refused(ContactFileError, "has no header: its first line holds an address", "ann@example.test,Ann\nbob@example.test,Bob\n")
    refused(ContactFileError, r"no column with the addresses.*--map COLUMN=email.*columns: first_name, city", "first_name,city\nAnn,Bonn\n")
    refused(ContactFileError, "'email' and 'E-Mail' may both hold the addresses", "email,E-Mail\na@example.test,b@example.test\n")
    refused(ContactFileError, "no column 'frist_name'; did you mean 'first_name'", good, mapping={"frist_name": "name"})
    refused(ContactFileError, "no column 'x'; known: email, first_name", good, mapping={"x": "name"})
    refused(ContactFileError, "'a' and 'b' both become the field 'name'", "email,a,b\n", mapping={"a": "name", "b": "name"})
    refused(ContactFileError, "'a' is the name of more than one column", "email,a,a\n")
    refused(ContactFileError, "no text in UTF-8", b"PK\x03\x04\x00\x00\xff\n")
    refused(ContactFileError, "no text in UTF-8", good.encode("utf-16"))
    refused(ContactFileError, "the header line is no CSV", 'email,"first\n')
    refused(ContactFileError, "no readable Parquet file", b"PAR1 and no more")
    refused(ContactFileError, "no readable Parquet file", good, "people.parquet")
    refused(FieldError, "'First Name' is no field key", good, mapping={"first_name": "First Name"})
    refused(FieldError, r"column 'id': field key 'id' is the name of a built-in.*--map 'id='", "email,id\n")
    refused(FieldError, r"column '名': no field key can be made.*--map '名=KEY'", "email,名\n")
    refused(FieldError, "no column of the file becomes the field 'firstname'; did you mean 'first_name'", good, types={"firstname": "text"})
    refused(FieldError, "'colour' is no field type; expected one of text, number", good, types={"first_name": "colour"})
    refused(InvalidKey, "list key", good, list_name="名")
    with pytest.raises(ContactFileError, match=r"absent\.csv cannot be read: No such file"):
        run(engine, tmp_path / "absent.csv")
    with pytest.raises(ContactFileError, match="cannot be read: Is a directory"):
        run(engine, tmp_path)
    assert attributes(engine) == {}
    with reading(engine) as connection:
        assert connection.execute(sa.select(Field.key)).all() == []
    # A header alone is a list without contacts, not a mistake.
    assert run(engine, write(tmp_path, "email,first_name\n")).read == 0
    with pytest.raises(FieldError, match="'first_name' is declared as text, not number: use text, or another key"):
        run(engine, write(tmp_path, good), types={"first_name": "number"})


def test_importing_again_changes_only_what_differs(engine: sa.Engine, tmp_path: Path) -> None:
    first = "email,name,orders\nann@example.test,Ann,1\nbob@example.test,Bób,2\ncay@example.test,Cay,3\n"
    assert run(engine, write(tmp_path, first)).inserted == 3
    forget_changes(engine)
    again = run(engine, write(tmp_path, first), now=LATER)
    assert (again.inserted, again.updated, again.unchanged) == (0, 0, 3)
    assert changed(engine) == []

    second = "email,orders,city\nANN@example.test,1,Bonn\nbob@example.test,2,\ndee@example.test,4,Köln\n"
    report = run(engine, write(tmp_path, second), now=LATER)
    assert (report.inserted, report.updated, report.unchanged) == (1, 1, 1)
    assert attributes(engine) == {
        "ann@example.test": {"name": "Ann", "orders": 1, "city": "Bonn"},
        "bob@example.test": {"name": "Bób", "orders": 2},
        "cay@example.test": {"name": "Cay", "orders": 3},
        "dee@example.test": {"orders": 4, "city": "Köln"},
    }
    assert changed(engine) == ["ann@example.test", "dee@example.test"]
    with reading(engine) as connection:
        times = {row.address: (row.email, row.updated_at) for row in connection.execute(sa.select(Contact.address, Contact.email, Contact.updated_at))}
    assert times["ann@example.test"] == ("ANN@example.test", LATER)
    assert times["bob@example.test"] == ("bob@example.test", NOW)

    forget_changes(engine)
    other = run(engine, write(tmp_path, first), list_name="Shop news")
    assert (other.list_key, other.inserted, other.updated, other.unchanged) == ("shop-news", 0, 3, 0)
    assert changed(engine) == ["ann@example.test", "bob@example.test", "cay@example.test"]


def test_import_respects_every_refusal(engine: sa.Engine, tmp_path: Path) -> None:
    text = "email,name\n" + "".join(f"{name}@example.test,{name}\n" for name in ("left", "quit", "gone", "bounced", "here"))
    run(engine, write(tmp_path, text))
    with reading(engine) as connection:
        ids = {row.address: row.id for row in connection.execute(sa.select(Contact.address, Contact.id))}

    def refuse(connection: sa.Connection) -> None:
        consent.unsubscribe(connection, [ids["left@example.test"]], scope="list", scope_id=1, now=NOW)
        consent.unsubscribe(connection, [ids["quit@example.test"]], scope="all", now=NOW)
        consent.erase(connection, ids["gone@example.test"], now=NOW)
        consent.suppress(connection, [address_hash("bounced@example.test")], reason="bounce", now=NOW)

    transact(engine, refuse)
    report = run(engine, write(tmp_path, text.replace(",here", ",HERE")), now=LATER)
    assert (report.inserted, report.updated, report.unchanged, report.rejected) == (0, 1, 3, 1)
    assert rejects(report) == {4: ERASED}
    assert subscriptions(engine) == {
        ("left@example.test", "news"): False,
        ("quit@example.test", "news"): False,
        ("bounced@example.test", "news"): True,
        ("here@example.test", "news"): True,
    }
    clause = consent.suppressed_clause(Contact.address_hash, Contact.domain, consent.campaign_scopes(1, 1))
    with reading(engine) as connection:
        found = set(connection.execute(sa.select(Contact.address).where(clause)).scalars())
    assert found == {"left@example.test", "quit@example.test", "bounced@example.test"}


def test_import_respects_refusals_among_many_new_contacts(engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(engine, write(tmp_path, "email\nleft@example.test\ngone@example.test\n"))
    with reading(engine) as connection:
        ids = {row.address: row.id for row in connection.execute(sa.select(Contact.address, Contact.id))}
    transact(engine, lambda connection: consent.unsubscribe(connection, [ids["left@example.test"]], scope="list", scope_id=1, now=NOW))
    transact(engine, lambda connection: consent.erase(connection, ids["gone@example.test"], now=NOW))
    forget_changes(engine)
    # From the second batch on, an import of new people inserts first and looks at the others afterwards.
    monkeypatch.setattr("mail_pipelines.contacts.files.BATCH_ROWS", 4)
    monkeypatch.setattr("mail_pipelines.contacts.files._BLOCK_LINES", 4)
    names = ["new1", "new2", "new3", "new4", "new5", "gone", "left", "new6", "new7", "new8", "new9", "new1"]
    report = run(engine, write(tmp_path, "email\n" + "".join(f"{name}@example.test\n" for name in names)), now=LATER)
    assert (report.inserted, report.unchanged, report.rejected, report.duplicates) == (9, 1, 1, 1)
    assert rejects(report) == {7: ERASED}
    assert subscriptions(engine).pop(("left@example.test", "news")) is False
    assert set(attributes(engine)) == {f"{name}@example.test" for name in names if name != "gone"}
    assert changed(engine) == sorted(f"new{number}@example.test" for number in range(1, 10))


# --- against the obvious ----------------------------------------------------------------------------------------

EMAILS = st.sampled_from(["a@x.test", "A@x.test", "b@x.test", "c@bücher.test", "d@x.test", "e@", "", "f g@x.test"])
CELLS = st.fixed_dictionaries(
    {
        "email": EMAILS,
        "word": st.sampled_from(["", " x ", 'q"q', "Ü,;", "\\", "a\nb", "=1+1", "null", "007"]),
        "number": st.sampled_from(["", "1", "1.50", "-0", "1e2", "x", "1234567890123456"]),
        "day": st.sampled_from(["", "2024-02-29", "2023-02-29", "2024-12-31", "31.12.2024"]),
    }
)
TYPES: dict[str, fields.FieldType] = {"word": "text", "number": "number", "day": "date"}


def obvious(contacts: dict[str, dict[str, Any]], rows: list[dict[str, str]]) -> int:
    """The import, row by row on a dictionary; returns how many rows were rejected."""
    rejected = 0
    for row in rows:
        try:
            address = parse(row["email"]).address
            new = {key: fields.parse_value(row[key].strip(), type_) for key, type_ in TYPES.items() if row[key].strip()}
        except (AddressError, ValueError):
            rejected += 1
            continue
        contacts[address] = contacts.get(address, {}) | new
    return rejected


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.lists(CELLS, max_size=12), min_size=1, max_size=3), st.booleans(), st.integers(1, 7))
def test_import_does_what_is_obvious(engine: sa.Engine, tmp_path: Path, uploads: list[list[dict[str, str]]], parquet: bool, batch: int) -> None:
    transact(engine, lambda connection: [connection.execute(sa.delete(table)) for table in (Contact, Subscription, ContactChange)])
    contacts: dict[str, dict[str, Any]] = {}
    for rows in uploads:
        before = json.loads(json.dumps(contacts))
        rejected = obvious(contacts, rows)
        path = tmp_path / ("people.parquet" if parquet else "people.csv")
        if parquet:
            pq.write_table(pa.table({key: pa.array([row[key] for row in rows], pa.string()) for key in ("email", *TYPES)}), path)
        else:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ["email", *TYPES], quoting=csv.QUOTE_MINIMAL)
                writer.writeheader()
                writer.writerows(rows)
        with pytest.MonkeyPatch.context() as patch:
            # Small batches, so that repeated addresses meet within one and across several.
            patch.setattr("mail_pipelines.contacts.files.BATCH_ROWS", batch)
            patch.setattr("mail_pipelines.contacts.files._BLOCK_LINES", batch)
            report = run(engine, path, types=TYPES)
        named = {parse(row["email"]).address for row in rows if _usable(row)}
        assert attributes(engine) == contacts
        assert report.read == len(rows)
        assert report.rejected == rejected
        assert report.inserted == len(contacts.keys() - before.keys())
        assert report.duplicates == len(rows) - rejected - len(named)
        assert report.read == report.inserted + report.updated + report.unchanged + report.rejected + report.duplicates


def _usable(row: dict[str, str]) -> bool:
    return obvious({}, [row]) == 0


# --- killed, and side by side -----------------------------------------------------------------------------------


def people(folder: Path, count: int) -> Path:
    rows = "".join(f"user{number}@x{number % 40}.test,Name{number},{number % 17}\n" for number in range(count))
    return write(folder, f"email,name,orders\n{rows}")


@pytest.mark.slow
def test_killed_import_run_again_leaves_nothing_out_and_nothing_twice(engine: sa.Engine, database_url: str, tmp_path: Path) -> None:
    path = people(tmp_path, 45_000)
    program = (
        "import sys, datetime as dt; from pathlib import Path\n"
        "from mail_pipelines.contacts.importing import import_file\n"
        "from mail_pipelines.database.engine import create_engine\n"
        "import_file(create_engine(sys.argv[1]), Path(sys.argv[2]), list_name='News', now=dt.datetime.now(dt.UTC),\n"
        "            progress=lambda read, fraction: print(read, flush=True))\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", program, database_url, str(path)], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    for _ in range(2):
        assert killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    with reading(engine) as connection:
        found = connection.execute(sa.select(sa.func.count()).select_from(Contact)).scalar_one()
    assert 0 < found < 45_000
    report = run(engine, path)
    assert report.inserted == 45_000 - found
    assert report.unchanged == found
    with reading(engine) as connection:
        for table in (Contact, Subscription, ContactChange):
            assert connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() == 45_000
        assert connection.execute(sa.select(sa.func.count(ContactChange.contact_id.distinct()))).scalar_one() == 45_000


def test_two_imports_at_once_make_each_contact_once(engine: sa.Engine, database_url: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    path = people(tmp_path / "a", 6_000)
    other = write(tmp_path / "b", path.read_bytes().replace(b"orders", b"visits"))
    reports: list[ImportReport] = []
    begin = threading.Barrier(2)

    def work(file: Path) -> None:
        own = create_engine(database_url)
        begin.wait()
        reports.append(import_file(own, file, list_name=file.parent.name, now=NOW))
        own.dispose()

    threads = [threading.Thread(target=work, args=(file,)) for file in (path, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(report.inserted for report in reports) == 6_000
    assert sum(report.updated for report in reports) == 6_000
    assert set(map(len, attributes(engine).values())) == {3}
    assert len(subscriptions(engine)) == 12_000


def test_progress_reaches_the_end(engine: sa.Engine, tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []
    run(engine, people(tmp_path, 12_000), progress=lambda read, fraction: seen.append((read, fraction)))
    assert [read for read, _ in seen] == [10_000, 12_000]
    assert 0 < seen[0][1] <= seen[1][1] == 1.0


def test_a_reject_file_that_cannot_be_written_is_named(engine: sa.Engine, tmp_path: Path) -> None:
    target = tmp_path / "folder" / "rejected.csv"
    with pytest.raises(ContactFileError, match=r"cannot be written to .*rejected\.csv: No such file"):
        run(engine, write(tmp_path, "email\nnobody\n"), reject_path=target)


def zones(engine: sa.Engine) -> dict[str, str | None]:
    with reading(engine) as connection:
        return dict(connection.execute(sa.select(Contact.address, Contact.time_zone)).tuples().all())


def test_a_time_zone_is_the_contacts_own_and_no_field(engine: sa.Engine, tmp_path: Path) -> None:
    path = write(tmp_path, "email,Time Zone,city\nann@a.test,europe/berlin,Berlin\nbob@a.test,,Bonn\ncat@a.test,Europe/Berln,Bern\ndan@a.test,Asia/Kolkata,\n")
    report = run(engine, path)
    assert (report.inserted, report.rejected) == (3, 1)
    assert rejects(report) == {4: "column 'Time Zone': 'Europe/Berln' is no time zone: expected a name of the IANA database, as Europe/Berlin"}
    assert zones(engine) == {"ann@a.test": "Europe/Berlin", "bob@a.test": None, "dan@a.test": "Asia/Kolkata"}
    assert attributes(engine) == {"ann@a.test": {"city": "Berlin"}, "bob@a.test": {"city": "Bonn"}, "dan@a.test": {}}
    again = run(engine, path, now=LATER)
    assert (again.unchanged, again.updated) == (3, 0)
    # An empty cell says nothing, another zone replaces the one before; many new contacts beside.
    more = "".join(f"new{number}@b.test,America/New_York\n" for number in range(20))
    changes = write(tmp_path, f"email,tz\nann@a.test,\nbob@a.test,UTC\ndan@a.test,America/New_York\n{more}", "changes.csv")
    report = run(engine, changes, mapping={"tz": "time_zone"}, now=LATER)
    assert (report.inserted, report.updated, report.unchanged) == (20, 2, 1)
    assert {name: zone for name, zone in zones(engine).items() if name.endswith("a.test")} == {
        "ann@a.test": "Europe/Berlin",
        "bob@a.test": "UTC",
        "dan@a.test": "America/New_York",
    }
    assert set(changed(engine)) >= {"bob@a.test", "dan@a.test"}
    with pytest.raises(FieldError, match="'time_zone' is the name of a built-in value"):
        run(engine, path, types={"time_zone": "text"})
