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

# As each system writes them: listmonk 6 (Go's times), MailWizz 2, Interspire 6 (month first, unless another column is chosen).
LISTMONK = """uuid,email,name,attributes,status,created_at,updated_at
1,Ann@Example.test,Ann,"{""city"": ""Köln"", ""age"": 7}",enabled,2020-01-02 03:04:05.123456 +0000 UTC,2020-01-02 03:04:05.123456 +0000 UTC
2,bob@example.test,Bob,{},blocklisted,2020-01-02 03:04:05 +0200 CEST,2021-01-02 03:04:05 +0200 CEST
3,cid@example.test,Cid,{},sleeping,0001-01-01 00:00:00 +0000 UTC,0001-01-01 00:00:00 +0000 UTC
4,no address,Dan,"{""late"": true}",enabled,,
"""
_HISTORY = "OPTIN_IP,OPTIN_DATE,OPTIN_CONFIRM_IP,OPTIN_CONFIRM_DATE,OPTOUT_IP,OPTOUT_DATE,OPTOUT_CONFIRM_IP,OPTOUT_CONFIRM_DATE"
MAILWIZZ = f"""EMAIL,FNAME,COLOURS,SOURCE,STATUS,IP_ADDRESS,DATE_ADDED,{_HISTORY}
ann@example.test,Ann,"red, blue",web,confirmed,192.0.2.1,"2020-01-02 03:04:05",192.0.2.1,"2020-01-02 03:04:05",192.0.2.2,"2020-01-03 03:04:05",,,,
left@example.test,Left,,import,unsubscribed,,"0000-00-00 00:00:00",,,,,192.0.2.9,"2021-05-05 10:00:00",192.0.2.9,"2021-05-05 10:00:09"
wait@example.test,,,web,unconfirmed,,,,,,,,,,
jo***@example.test,Jo,,web,confirmed,,"2020-01-02 03:04:05",,,,,,,,
"""
BOUNCES = """Email,"Bounce type",Message,"Date added"
ann@example.test,Hard,"550 5.1.1 <ann@example.test> unknown","2020-03-04 05:06:07"
ann@example.test,Soft,"452 4.2.2 full","2020-03-01 05:06:07"
ann@example.test,Soft,"452 4.2.2 full","2020-03-01 05:06:07"
stranger@example.test,Hard,,"2020-03-04 05:06:07"
"""
COMPLAINTS = """Email,Message,"Date added"
wait@example.test,"Feedback loop","2020-06-06 00:00:00"
"""
BLACKLIST = """Email,Reason,"Date added"
dead@example.test,"550 5.1.1 No such user","2020-03-03 00:00:00"
angry@example.test,"Abuse complaint","2020-03-03 00:00:00"
d41d8cd98f00b204e9800998ecf8427e,,"2020-03-03 00:00:00"
"""
INTERSPIRE = """"Email Address","Format","Confirmed","Subscribe Date (mm/dd/yyyy)","Contacts IP Address","First Name","Colours"
"ann@example.test","HTML","Confirmed","12/31/2019","192.0.2.1","MÃ¼ller","Red"
"bob@example.test","Text","Unconfirmed","02/01/2020","Unknown IP Address","Bob &amp; Co",""
"""
INTERSPIRE_BOUNCED = """"Email Address","Format","Confirmed","Subscribe Date (dd/mm/yyyy)","Contacts IP Address","Time of Bounce","Type of Bounce"
"dead@example.test","HTML","Confirmed","31/12/2019","192.0.2.1","2021/03/04","Email Address doesn't exist (hard bounce)"
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


def standings(engine: sa.Engine, email: str) -> list[tuple[bool, str, str]]:
    return [(row.subscribed, row.source, f"{row.changed_at:%F}") for row in profile(engine, email).lists]


def test_export_of_listmonk(engine: sa.Engine, tmp_path: Path) -> None:
    path = file(tmp_path, LISTMONK)
    # Who is enabled there may have left the list, which the file does not say.
    result = invoke("listmonk", "--file", path, "--list", "News")
    assert isinstance(result.exception, MigrationError)
    assert "say with --state" in str(result.exception)
    checked = says("listmonk", "--file", path, "--list", "News", "--state", "active", "--check")
    assert "would come" in checked
    assert contacts(engine) == 0
    rejects = tmp_path / "why.csv"
    said = says("listmonk", "--file", path, "--list", "News", "--state", "active", "--rejects", str(rejects))
    assert "its state is none that is known" in said
    assert "address: it has no '@'" in rejects.read_text()
    ann = profile(engine, "ann@example.test")
    assert ann.attributes == {"name": "Ann", "city": "Köln", "age": 7}
    assert standings(engine, "ann@example.test") == [(True, "import", "2020-01-02")]
    assert [(row.where, row.reason) for row in profile(engine, "bob@example.test").suppressions] == [("all", "unsubscribe")]
    assert contacts(engine) == 2
    says("listmonk", "--file", path, "--list", "Shop", "--state", "left")
    assert [(row.list_key, row.subscribed) for row in profile(engine, "ann@example.test").lists] == [("news", True), ("shop", False)]


def test_export_of_mailwizz(engine: sa.Engine, tmp_path: Path) -> None:
    said = says("mailwizz", "--file", file(tmp_path, MAILWIZZ), "--list", "News")
    assert "address: it is masked" in said
    ann = profile(engine, "ann@example.test")
    assert ann.attributes == {"fname": "Ann", "colours": "red, blue"}
    assert standings(engine, "ann@example.test") == [(True, "import", "2020-01-03")]
    assert standings(engine, "left@example.test") == [(False, "unsubscribe", "2021-05-05")]
    assert [(row.where, row.reason) for row in profile(engine, "left@example.test").suppressions] == [("list News", "unsubscribe")]
    assert [(row.subscribed, row.source) for row in profile(engine, "wait@example.test").lists] == [(False, "unconfirmed")]
    assert contacts(engine) == 3


def test_reports_of_mailwizz(engine: sa.Engine, tmp_path: Path) -> None:
    says("mailwizz", "--file", file(tmp_path, MAILWIZZ), "--list", "News")
    for _ in range(2):
        said = says("mailwizz", "--file", file(tmp_path, BOUNCES), "--holds", "bounces")
        assert "bounces: 4 in mailwizz, 3 here" in said
        assert "there is no such contact here" in said
        assert "bounces: 1 in mailwizz, 1 here" in says("mailwizz", "--file", file(tmp_path, COMPLAINTS), "--holds", "complaints")
        assert "bans: 3 in mailwizz, 2 here" in says("mailwizz", "--file", file(tmp_path, BLACKLIST), "--holds", "blacklist")
    ann = profile(engine, "ann@example.test")
    assert [(bounce.kind, bounce.reply, f"{bounce.occurred_at:%F}") for bounce in ann.bounces] == [
        ("hard", "550 5.1.1 <***@example.test> unknown", "2020-03-04"),
        ("soft", "452 4.2.2 full", "2020-03-01"),
    ]
    assert ann.suppressions == []
    reasons = {name: [row.reason for row in profile(engine, f"{name}@example.test").suppressions] for name in ("wait", "dead", "angry")}
    assert reasons == {"wait": ["complaint"], "dead": ["bounce"], "angry": ["complaint"]}
    refused = invoke("listmonk", "--file", file(tmp_path, BOUNCES), "--holds", "bounces")
    assert "listmonk exports no bounces" in str(refused.exception)


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


def test_export_of_interspire_says_who_confirmed_and_what_bounced(engine: sa.Engine, tmp_path: Path) -> None:
    says("interspire", "--file", file(tmp_path, INTERSPIRE), "--list", "News", "--state", "active")
    assert standings(engine, "ann@example.test") == [(True, "import", "2019-12-31")]
    assert standings(engine, "bob@example.test") == [(False, "unconfirmed", "2020-02-01")]
    for _ in range(2):
        said = says("interspire", "--file", file(tmp_path, INTERSPIRE_BOUNCED), "--list", "News", "--state", "bounced")
        assert "bounces: 1 in interspire, 1 here" in said
    dead = profile(engine, "dead@example.test")
    assert dead.attributes == {}
    assert [(row.where, row.reason, f"{row.created_at:%F}") for row in dead.suppressions] == [("all", "bounce", "2021-03-04")]
    assert [(bounce.kind, f"{bounce.occurred_at:%F}") for bounce in dead.bounces] == [("hard", "2021-03-04")]


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
        (("mailwizz", "--holds", "bounces"), "are for --file"),
        (("mailwizz", "--file", "x.csv", "--holds", "bounces", "--list", "News"), "are for subscribers"),
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
