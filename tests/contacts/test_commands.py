"""`mail-pipelines contact …` as an operator types it."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import Result
from typer.testing import CliRunner

from mail_pipelines.commands import context
from mail_pipelines.commands.contact import UsageError, app
from mail_pipelines.contacts import lookup
from mail_pipelines.contacts.addresses import AddressError
from mail_pipelines.contacts.consent import ConsentError
from mail_pipelines.contacts.fields import FieldError
from mail_pipelines.contacts.files import ContactFileError
from mail_pipelines.contacts.lists import ListError
from mail_pipelines.contacts.lookup import UnknownContact
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Campaign, Delivery, State
from mail_pipelines.errors import MailPipelinesError
from tests.contacts.conftest import NOW


@pytest.fixture
def people(tmp_path: Path) -> Path:
    path = tmp_path / "people.csv"
    path.write_text("email,Vorname,zip\nann@example.test,Ann,1234\nbob@example.test,Bob,5678\nnobody,x,1\n")
    return path


@pytest.fixture(autouse=True)
def _database(database_url: str, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", database_url)
    context.settings.cache_clear()


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def says(*words: str) -> str:
    result = invoke(*words)
    assert result.exit_code == 0, result.exception
    return " ".join(result.output.split())


def fails(error: type[MailPipelinesError], text: str, *words: str) -> None:
    result = invoke(*words)
    assert isinstance(result.exception, error)
    assert text in str(result.exception)


def bounced(engine: sa.Engine, email: str) -> None:
    def work(connection: sa.Connection) -> None:
        contact_id = lookup.contact_id_of(connection, email)
        campaign = {"id": 7, "key": "spring", "name": "Spring", "state": "finished", "brand_id": 1, "segments": {}, "unsubscribe": "all"}
        connection.execute(sa.insert(Campaign), campaign | {"on_unknown": "hold", "priority": 1, "created_at": NOW, "updated_at": NOW})
        row = {"campaign_id": 7, "contact_id": contact_id, "address_hash": b"x" * 16, "shard": 0, "provider": "other", "sort_key": 0}
        connection.execute(sa.insert(Delivery), row | {"state": int(State.BOUNCED), "attempt": 1, "code": 550, "enhanced": "5.1.1", "reason": "unknown_user"})

    transact(engine, work)


def test_a_contact_from_import_to_erasure(engine: sa.Engine, people: Path) -> None:
    said = says("import", str(people), "--list", "Garden news", "--map", "Vorname=first_name", "--field", "zip=text")
    assert "3 rows read into list garden-news: 2 new, 0 changed, 0 unchanged, 0 duplicates, 1 rejected" in said
    assert "people.csv.rejected.csv" in said
    bounced(engine, "ann@example.test")
    shown = says("show", "ANN@example.test")
    for words in (
        "ann@example.test",
        "first_name │ Ann",
        "zip │ 1234",
        "garden-news │ subscribed │ import",
        "spring │ bounced │ attempt 1 │ 550 5.1.1 unknown_user",
    ):
        assert words in shown
    assert says("suppress", "bob@example.test", "--reason", "complaint") == "suppressed"
    assert says("suppress", "bob@example.test") == "was suppressed already"
    assert says("suppress", "example.test") == "suppressed"
    shown = says("show", "bob@example.test")
    assert "address │ all │ complaint" in shown
    assert "example.test │ all │ manual" in shown
    assert says("unsubscribe", "ann@example.test", "--list", "garden-news") == "unsubscribed"
    shown = says("show", "ann@example.test")
    assert "garden-news │ ended │ unsubscribe" in shown
    assert "address │ list Garden news │ unsubscribe" in shown
    assert says("unsubscribe", "ann@example.test", "--all") == "unsubscribed"
    assert "address │ all │ unsubscribe" in says("show", "ann@example.test")
    assert invoke("erase", "ann@example.test").exit_code == 1, "nobody is erased without a yes"
    assert says("erase", "ann@example.test", "--yes") == "erased"
    shown = says("show", "ann@example.test")
    assert "none (erased, or never imported)" in shown
    assert "address │ all │ erased" in shown
    assert "1 unchanged" in says("import", str(people), "--list", "Garden news", "--map", "Vorname=first_name")


def test_values_are_shown_as_they_are(people: Path) -> None:
    people.write_text("email,nick\nann@example.test,Ann [/red]\n")
    says("import", str(people), "--list", "News", "--field", "nick=text")
    assert "nick │ Ann [/red]" in says("show", "ann@example.test")


def test_mistakes_end_with_the_projects_errors(people: Path) -> None:
    fails(ContactFileError, "absent.csv cannot be read", "import", "absent.csv", "--list", "News")
    fails(ContactFileError, "did you mean 'Vorname'", "import", str(people), "--list", "News", "--map", "Vornam=first_name")
    fails(UsageError, "--map 'Vorname': expected column=field", "import", str(people), "--list", "News", "--map", "Vorname")
    fails(FieldError, "'string' is no field type", "import", str(people), "--list", "News", "--field", "zip=string")
    fails(AddressError, "n*** is no usable address", "show", "nobody")
    fails(UnknownContact, "nothing is known of e***@example.test", "show", "eve@example.test")
    fails(ConsentError, "'mood' is not known", "suppress", "ann@example.test", "--reason", "mood")
    fails(ConsentError, "'localhost' is no domain", "suppress", "localhost")
    fails(UsageError, "either --list NAME or --all", "unsubscribe", "ann@example.test")
    fails(UsageError, "either --list NAME or --all", "unsubscribe", "ann@example.test", "--all", "--list", "x")
    fails(UnknownContact, "no contact e***@example.test", "unsubscribe", "eve@example.test", "--all")
    says("import", str(people), "--list", "News")
    fails(ListError, "no list 'newz'; did you mean 'news'", "unsubscribe", "ann@example.test", "--list", "newz")
