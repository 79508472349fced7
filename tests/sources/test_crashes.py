"""A run that is killed and run again gives what one gives that nobody disturbed. On both databases."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import create_engine, reading
from mail_pipelines.database.models import Contact, ContactChange, SourceContact, Subscription
from mail_pipelines.sources import leftovers, running, staging, status
from mail_pipelines.sources.declaration import Source
from mail_pipelines.sources.running import Report
from tests.parts.kills import killed_at, killed_throughout
from tests.sources.conftest import Declare, subscribed

pytestmark = pytest.mark.slow
Sync = Callable[..., Report]


def write(folder: Path, count: int, *, left: int = 0, **more: Any) -> None:
    """Every `left`th has left there."""
    folder.mkdir(exist_ok=True)

    def row(number: int) -> dict[str, Any]:
        out = "true" if left and number % left == 0 else None
        return {"id": number, "mail": f"p{number}@example.test" if number % 10 else "nobody", "name": f"P{number}", "out": out, **more}

    rows = [row(number) for number in range(count)]
    (folder / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def source(declare: Declare, tmp_path: Path) -> Source:
    write(tmp_path / "drop", 40)
    mapping = {"id": "external_id", "mail": "email", "name": "first_name", "city": "city", "out": "opted_out"}
    return declare(kind="files", connection={"url": str(tmp_path / "drop")}, contacts={"read": {"glob": "*"}, "map": mapping, "deletions": {"share": 0.5}})


def counts(engine: sa.Engine) -> dict[str, int]:
    with reading(engine) as connection:
        return {
            table.__tablename__: connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            for table in (Contact, Subscription, SourceContact, ContactChange)
        }


def test_killed_at_one_commit_after_the_other_it_gets_there(
    engine: sa.Engine, home: Path, source: Source, sync: Sync, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "CHUNK_ROWS", 5)
    monkeypatch.setattr(running, "_NOTE_SECONDS", 0.0)
    url = engine.url.render_as_string(hide_password=False)
    assert killed_throughout(url, lambda own: running.run(own, home, source, "contacts"), 30) > 5
    report = sync(source)
    assert report.standing.counts["unchanged"] == 36
    assert report.standing.rejected == {"address: it has no '@'": 4}
    assert counts(engine) == {"contacts": 36, "subscriptions": 36, "source_contacts": 36, "contact_changes": 36}
    # Once more with records that are gone, the rest changed, and four people who left.
    write(tmp_path / "drop", 30, left=7, city="Bonn")
    killed_throughout(url, lambda own: running.run(own, home, source, "contacts"), 30)
    sync(source)
    assert subscribed(engine) == {f"p{number}@example.test" for number in range(30) if number % 10 and number % 7}
    with reading(engine) as connection:
        cities = [row["city"] for row in connection.execute(sa.select(Contact.attributes)).scalars() if "city" in row]
    assert cities == ["Bonn"] * 27
    assert status.read(engine, "crm", "contacts").error is None


def kill_while_it_lands(engine: sa.Engine, home: Path, source: Source) -> None:
    def work(own: sa.Engine, one_more: Callable[..., None]) -> None:
        write_rows = staging.Staging.write

        def counted(self: staging.Staging, rows: Any) -> None:
            write_rows(self, rows)
            one_more()

        staging.Staging.write = counted  # type: ignore[method-assign]
        running.run(own, home, source, "contacts")

    assert killed_at(2, engine.url.render_as_string(hide_password=False), work, ())


def test_killed_while_it_lands_it_goes_on_with_what_was_extracted(engine: sa.Engine, home: Path, source: Source, sync: Sync, tmp_path: Path) -> None:
    write(tmp_path / "drop", 25_000)
    kill_while_it_lands(engine, home, source)
    assert counts(engine)["contacts"] == 0
    # The source is away, and is not needed: everything was extracted.
    (tmp_path / "drop" / "people.jsonl").unlink()
    report = sync(source)
    assert (report.standing.counts["read"], report.standing.counts["inserted"]) == (25_000, 22_500)
    assert len(subscribed(engine)) == 22_500


def named(home: Path) -> list[str]:
    """Files of the work folder with people in them; a package is compressed."""
    files = [path for path in running.work_folder(home).rglob("*") if path.is_file()]
    return sorted(path.name for path in files if path.suffix == ".parquet" or b"p1@example.test" in path.read_bytes())


def test_nothing_of_anybody_stays_in_staging_or_packages_and_nothing_grows(engine: sa.Engine, home: Path, source: Source, sync: Sync, tmp_path: Path) -> None:
    def size() -> int:
        return sum(path.stat().st_size for path in running.work_folder(home).rglob("*") if path.is_file())

    write(tmp_path / "drop", 3_000)
    sync(source)
    first = size()
    sync(source)
    sync(source)
    assert size() < first + 10_000 < 1_000_000
    assert named(home) == []
    with staging.open_staging(engine, running.work_folder(home), "crm", "contacts") as area:
        assert area.landing() is None
        assert sa.inspect(area.engine).get_table_names() == ["landings"]


@pytest.mark.parametrize("reason", ["old", "declared no more"])
def test_what_a_killed_run_left_of_people_is_deleted_at_night(engine: sa.Engine, home: Path, source: Source, tmp_path: Path, reason: str) -> None:
    write(tmp_path / "drop", 25_000)
    kill_while_it_lands(engine, home, source)
    now = dt.datetime.now(dt.UTC)
    assert leftovers.remove(engine, home, now) == []
    assert named(home) != []
    if reason == "declared no more":
        (home / "sources" / "crm.yaml").unlink()
    assert leftovers.remove(engine, home, now + (leftovers.KEPT if reason == "old" else dt.timedelta(0)) + dt.timedelta(minutes=1)) != []
    assert named(home) == []
    with staging.open_staging(engine, running.work_folder(home), "crm", "contacts") as area:
        assert sa.inspect(area.engine).get_table_names() == ["landings"]
    if reason == "old":
        assert running.run(engine, home, source, "contacts").standing.counts["inserted"] == 22_500


def test_two_runs_of_one_source_do_not_mix(engine: sa.Engine, database_url: str, home: Path, source: Source) -> None:
    from mail_pipelines.dispatch.files import AlreadyRunning, only_one

    with only_one(running.work_folder(home) / "crm.lock", "source crm"):
        assert running.is_running(home, "crm")
        with pytest.raises(AlreadyRunning):
            running.run(create_engine(database_url), home, source, "contacts")
    assert not running.is_running(home, "crm")
    assert status.read(engine, "crm", "contacts").run == 0
