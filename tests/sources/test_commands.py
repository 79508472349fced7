"""`mail-pipelines source …` as an operator types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from mail_pipelines.commands import context
from mail_pipelines.commands.source import app
from mail_pipelines.sources.declaration import Source
from mail_pipelines.sources.errors import DeclarationError, GuardStopped
from tests.sources.conftest import Declare, engaged

pytestmark = pytest.mark.slow


def says(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.exception
    return " ".join(result.output.split())


def fails(error: type[Exception], *words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert isinstance(result.exception, error)
    return str(result.exception)


@pytest.fixture(autouse=True)
def _home(database_url: str, engine: sa.Engine, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", database_url)
    monkeypatch.setenv("MAIL_PIPELINES_HOME", str(home))
    context.settings.cache_clear()


def test_from_the_declaration_to_the_status(home: Path, declare: Declare, tmp_path: Path) -> None:
    folder = tmp_path / "drop"
    folder.mkdir()
    people: list[dict[str, Any]] = [{"id": number, "mail": f"p{number}@example.test"} for number in range(20)] + [{"id": 99, "mail": "x"}]
    (folder / "a.jsonl").write_text("".join(json.dumps(person) + "\n" for person in people))
    declare(kind="files", connection={"url": str(folder)}, contacts={"read": {"glob": "*"}, "map": {"id": "external_id", "mail": "email"}})
    (home / "sources" / "broken.yaml").write_text("name: broken\nkind: ftp\n")
    listed = says("list")
    assert "crm" in listed
    assert "kind: 'ftp' is not known" in listed or "contacts or suppressions" in listed
    assert says("check", "crm") == "crm contacts: the first page has 21 rows, 20 with a usable address"
    # One that cannot be read keeps the other from nothing.
    assert "broken.yaml: contacts or suppressions" in says("status")
    rows = [json.loads(line) for line in says("status", "--json").replace("} {", "}\n{").splitlines()]
    assert [(row["source"], row["section"]) for row in rows] == [("crm", "contacts"), ("broken", None)]
    assert "21 read, 20 inserted" in says("run", "crm")
    assert "did you mean 'crm'" in fails(DeclarationError, "run", "crn")
    (home / "sources" / "broken.yaml").unlink()
    (folder / "a.jsonl").write_text(json.dumps(people[0]) + "\n")
    assert "19 of 20 records are gone" in fails(GuardStopped, "run", "crm")
    standing = json.loads(says("status", "--json"))
    assert (standing["source"], standing["missing"], standing["run"]) == ("crm", 19, 2)
    assert "19 of 20" in standing["error"]
    assert "19 subscriptions ended" in says("run", "crm", "--accept-deletions")
    assert "19 of 20" not in says("status", "crm")


def test_a_mapping_that_fits_nothing_is_seen_by_a_check(declare: Declare, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": 1, "person": {"name": "Ann", "mails": [{"at": "ann@example.test"}]}}) + "\n")
    mapping = {"id": "external_id", "person.mails.0.at": "email", "person.nmae": "first_name"}
    declare(kind="files", connection={"url": str(tmp_path)}, contacts={"read": {"glob": "*.jsonl"}, "map": mapping})
    assert says("check", "crm") == (
        "crm contacts: the first page has 1 rows, 1 with a usable address nothing stands in person.nmae; the columns there: id, person.mails, person.name"
    )


def test_what_was_refused_is_listed_and_sent_again(engine: sa.Engine, database_there: tuple[Source, sa.Engine]) -> None:
    _, there = database_there
    says("run", "crm")
    assert "crm has no dead letters" in says("dead-letters", "crm")
    engaged(engine, range(1, 3))
    engaged(engine, range(20, 21), "click")
    assert "2 pushed, 1 dead" in says("run", "crm")
    assert "is told" in says("list")
    listed = says("dead-letters", "crm")
    assert "click-20" in listed
    assert "IntegrityError" in listed
    with there.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE happened RENAME TO refused")
        connection.exec_driver_sql("CREATE TABLE happened (event TEXT, person TEXT, what TEXT, at DATETIME)")
    assert "1 events wait again" in says("retry", "crm")
    assert "1 pushed" in says("run", "crm")
    assert "crm has no dead letters" in says("dead-letters", "crm")
    told = json.loads(says("status", "--json").rpartition("} ")[2])
    assert (told["section"], told["counts"]["pushed"]) == ("engagement", 1)
