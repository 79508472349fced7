"""`mail-pipelines migrate …` as an operator types it: exports, and what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import Result
from typer.testing import CliRunner

from mail_pipelines.cli import app
from mail_pipelines.commands import context
from mail_pipelines.commands.migrate import URL_VARIABLE, MigrateError
from mail_pipelines.contacts import lookup
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Contact
from mail_pipelines.migration.exports import STATES, Columns, document
from mail_pipelines.migration.source import MigrationError
from tests.migration.installations import MANY

LISTMONK = """uuid,email,name,attributes,status,created_at,updated_at
1,Ann@Example.test,Ann,"{""city"": ""Köln"", ""age"": 7}",enabled,2020-01-02T03:04:05Z,2020-01-02T03:04:05Z
2,bob@example.test,Bob,{},blocklisted,2020-01-02T03:04:05Z,2021-01-02T03:04:05Z
3,cid@example.test,Cid,{},sleeping,,
4,no address,Dan,"{""late"": true}",enabled,,
"""
MAILWIZZ = """"EMAIL","FNAME","COLOURS","status","ip_address","source","date_added"
"ann@example.test","Ann","red, blue","confirmed","192.0.2.1","web","2020-01-02 03:04:05"
"left@example.test","Left","","unsubscribed","","import","0000-00-00 00:00:00"
"wait@example.test","","","unconfirmed","","web",""
"""
INTERSPIRE = """Email Address,Format,Subscribe Date,First Name,Colours
ann@example.test,HTML,31/12/2019,MÃ¼ller,"a:1:{i:0;s:3:""Red"";}"
bob@example.test,Text,,Bob &amp; Co,
"""


@pytest.fixture(autouse=True)
def _database(database_url: str, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", database_url)
    context.settings.cache_clear()


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, ["migrate", *words], env={"COLUMNS": "200"})


def says(*words: str) -> str:
    result = invoke(*words)
    assert result.exit_code == 0, result.exception
    return " ".join(result.output.split())


def file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "export.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


def profile(engine: sa.Engine, email: str) -> lookup.Profile:
    with reading(engine) as connection:
        return lookup.profile(connection, email)


def contacts(engine: sa.Engine) -> int:
    with reading(engine) as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(Contact)).scalar_one()


def test_export_of_listmonk(engine: sa.Engine, tmp_path: Path) -> None:
    path = file(tmp_path, LISTMONK)
    checked = says("listmonk", "--file", path, "--list", "News", "--check")
    assert "would come" in checked
    assert contacts(engine) == 0
    rejects = tmp_path / "why.csv"
    said = says("listmonk", "--file", path, "--list", "News", "--rejects", str(rejects))
    assert "its state is none that is known" in said
    assert "address: it has no '@'" in rejects.read_text()
    ann = profile(engine, "ann@example.test")
    assert ann.attributes == {"name": "Ann", "city": "Köln", "age": 7}
    assert [(row.list_key, row.subscribed, f"{row.changed_at:%F}") for row in ann.lists] == [("news", True, "2020-01-02")]
    assert [(row.where, row.reason) for row in profile(engine, "bob@example.test").suppressions] == [("all", "unsubscribe")]
    assert contacts(engine) == 2


def test_export_of_mailwizz(engine: sa.Engine, tmp_path: Path) -> None:
    says("mailwizz", "--file", file(tmp_path, MAILWIZZ), "--list", "News")
    assert profile(engine, "ann@example.test").attributes == {"fname": "Ann", "colours": "red, blue"}
    left = profile(engine, "left@example.test")
    assert [(row.subscribed, row.source) for row in left.lists] == [(False, "unsubscribe")]
    assert [(row.where, row.reason) for row in left.suppressions] == [("list News", "unsubscribe")]
    assert [(row.subscribed, row.source) for row in profile(engine, "wait@example.test").lists] == [(False, "unconfirmed")]


def test_export_of_interspire_says_who_left_by_an_option_only(engine: sa.Engine, tmp_path: Path) -> None:
    path = file(tmp_path, INTERSPIRE)
    result = invoke("interspire", "--file", path, "--list", "News")
    assert isinstance(result.exception, MigrationError)
    assert "say with --state" in str(result.exception)
    says("interspire", "--file", path, "--list", "News", "--state", "left")
    assert not any(row.subscribed for row in profile(engine, "ann@example.test").lists)
    says("interspire", "--file", path, "--list", "News", "--state", "active")
    ann = profile(engine, "ann@example.test")
    assert not any(row.subscribed for row in ann.lists)
    assert ann.attributes == {"first_name": "Müller", "colours": "Red"}
    assert profile(engine, "bob@example.test").attributes == {"first_name": "Bob & Co"}


@pytest.mark.server
def test_database_of_interspire_by_the_environment(engine: sa.Engine, interspire_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL_VARIABLE, interspire_url)
    says("interspire", "--check")
    assert contacts(engine) == 0
    said = says("interspire")
    assert "DIFFERS" not in said
    assert f"{MANY + 5:,}" in said
    assert "bans: 5 in interspire, 4 here" in said
    assert "field_address" in said


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("interspire",), f"set {URL_VARIABLE}"),
        (("interspire", "--list", "News"), "are for --file"),
        (("mailwizz", "--file", "x.csv"), "--list"),
        (("mailwizz", "--file", "x.csv", "--list", "News", "--state", "happy"), "'happy' is no state"),
    ],
)
def test_what_is_missing_is_named(words: tuple[str, ...], error: str) -> None:
    result = invoke(*words)
    assert isinstance(result.exception, MigrateError)
    assert error in str(result.exception)


def test_file_without_addresses_is_named(tmp_path: Path) -> None:
    result = invoke("mailwizz", "--file", file(tmp_path, "a,b\n1,2\n"), "--list", "News")
    assert isinstance(result.exception, MigrationError)
    assert "no column 'EMAIL'" in str(result.exception)


def test_rules_of_exports_use_states_that_exist() -> None:
    for system, rules in document().items():
        assert set(rules["states"]) <= set(STATES)
        assert set(Columns.of(system, [rules["email"][0]]).states.values()) == set(rules["states"])


def test_sending_loads_no_driver_of_other_systems() -> None:
    program = "import sys, mail_pipelines.cli; sys.exit('pg8000' in sys.modules or 'mail_pipelines.migration.running' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, env=dict(os.environ)).returncode == 0
