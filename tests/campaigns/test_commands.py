"""`mail-pipelines campaign …` as an operator types it, from file to frozen audience and its end."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from mail_pipelines import config
from mail_pipelines.campaigns import lifecycle
from mail_pipelines.campaigns.campaign import CampaignError
from mail_pipelines.campaigns.check import CheckFailed
from mail_pipelines.campaigns.states import StateError
from mail_pipelines.campaigns.yaml_form import FormError
from mail_pipelines.commands import campaign as commands
from mail_pipelines.commands import context
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Delivery, State
from mail_pipelines.delivery import counters
from tests.campaigns.parts import NOW, fill_ledger, ledger_states, load, make_campaign, make_people

FORM = """name: Spring [bold] Sale
key: spring-sale
segments:
  include: [everybody]
content:
  subject: Hello {{ number }}
  from_address: news@shop.example
  body: |
    <p>Hello</p>
    <p><a href="{{ unsubscribe_url }}">Leave</a></p>
"""


class Command:
    """Types `mail-pipelines campaign WORDS`; a mistake is raised as the command line would print it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "campaign.yaml"
        self.file.write_text(FORM)

    def __call__(self, *words: str) -> Result:
        return CliRunner().invoke(commands.app, list(words))

    def says(self, *words: str) -> str:
        result = self(*words)
        assert result.exception is None, result.exception
        return result.output

    def fails(self, error: type[Exception], *words: str) -> str:
        result = self(*words)
        assert isinstance(result.exception, error), (result.output, result.exception)
        return str(result.exception)


@pytest.fixture
def command(database_url: str, engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", database_url)
    monkeypatch.setenv("MAIL_PIPELINES_SENDING__TOKEN_KEY", "a key for tests only, long enough")
    context.settings.cache_clear()
    make_people(engine, config.load(), 30)
    return Command(tmp_path)


def test_from_file_to_the_end(command: Command, engine: sa.Engine) -> None:
    assert "spring-sale is draft" in command.says("import", str(command.file))
    assert "[bold]" in command.says("list")
    assert "can be scheduled" in command.says("check", "spring-sale")
    exported = command.says("export", "spring-sale")
    command.file.write_text(exported)
    assert "spring-sale is draft" in command.says("import", str(command.file))
    assert command.says("export", "spring-sale") == exported
    assert "is scheduled" in command.says("start", "spring-sale")
    assert "is draft" in command.says("unschedule", "spring-sale")
    assert "is scheduled" in command.says("start", "spring-sale")
    built = command.says("build", "spring-sale")
    assert "matched 30, excluded nobody, audience 30" in built
    assert "spring-sale is sending" in built
    assert "nothing was frozen now: it is sending" in command.says("build", "spring-sale")
    assert "is paused" in command.says("pause", "spring-sale")
    assert "is sending" in command.says("resume", "spring-sale")
    assert "is to finish by 2100-03-02 08:00:00 UTC" in command.says("deadline", "spring-sale", "2100-03-02T09:00:00+01:00")
    assert "2100-03-02 08:00:00 UTC" in command.says("show", "spring-sale")
    assert "has no deadline" in command.says("deadline", "spring-sale")
    status = command.says("status", "spring-sale")
    assert [line.split("│")[1:3] for line in status.splitlines() if "pending" in line] == [[" pending    ", "         30 "]]
    assert "30 waiting recipients will not get it" in command.says("cancel", "spring-sale")
    shown = command.says("show", "spring-sale")
    assert "30 in 1 shards" in shown
    assert "[bold]" in shown
    assert ledger_states(engine, load(engine).id) == {State.CANCELLED: 30}


def test_import_notes_what_is_wrong_and_schedule_refuses_it(command: Command) -> None:
    command.file.write_text(FORM.replace("{{ number }}", "{{ nubmer }}"))
    assert "note: content.subject, line 1" in command.says("import", str(command.file))
    result = command("check", "spring-sale")
    assert result.exit_code == 1
    assert "nubmer" in result.output
    assert "nubmer" in command.fails(CheckFailed, "start", "spring-sale")


def test_a_wrong_file_changes_nothing(command: Command, tmp_path: Path) -> None:
    assert "cannot be read" in command.fails(CampaignError, "import", str(tmp_path / "none.yaml"))
    command.file.write_bytes(b"name: \xff")
    assert "not UTF-8" in command.fails(CampaignError, "import", str(command.file))
    command.file.write_text(FORM.replace("segments:", "segmnts:"))
    assert "did you mean 'segments'" in command.fails(FormError, "import", str(command.file))
    assert "there is no campaign 'spring-sale'" in command.fails(CampaignError, "show", "spring-sale")


def test_a_time_needs_its_zone(command: Command) -> None:
    command.says("import", str(command.file))
    assert "--at: expected a time with its zone" in command.fails(FormError, "schedule", "spring-sale", "--at", "2026-03-02T09:00:00")
    assert "starts at 2100-03-02 08:00:00 UTC" in command.says("schedule", "spring-sale", "--at", "2100-03-02T09:00:00+01:00")


def test_new_content_reaches_a_sending_campaign_only_when_confirmed(command: Command, engine: sa.Engine) -> None:
    command.says("import", str(command.file))
    command.says("start", "spring-sale")
    command.says("build", "spring-sale")
    command.file.write_text(FORM.replace("Hello {{ number }}", "Corrected"))
    assert "--confirm" in command.fails(StateError, "import", str(command.file))
    before = load(engine).version_id
    assert "is sending" in command.says("import", str(command.file), "--confirm")
    assert load(engine).version_id != before
    assert "version 2, 'Corrected'" in command.says("show", "spring-sale")


def test_following_ends_with_the_campaign(command: Command, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = make_campaign(engine, "short", state="sending")
    fill_ledger(engine, campaign.id, {State.PENDING: 4})
    looks = 0

    def deliver(_seconds: float) -> None:
        nonlocal looks
        looks += 1

        def work(connection: sa.Connection) -> None:
            row = connection.execute(sa.select(Delivery.__table__).where(Delivery.state == int(State.PENDING)).limit(1)).one()
            connection.execute(sa.update(Delivery).where(Delivery.contact_id == row.contact_id).values(state=int(State.DELIVERED)))
            moves = {(row.shard, row.provider, State.PENDING, ""): -1, (row.shard, row.provider, State.DELIVERED, ""): 1}
            counters.add(connection, campaign.id, 3, moves, NOW)

        transact(engine, work)
        lifecycle.finish_if_done(engine, campaign.id, NOW)

    # The world goes on where the command waits.
    monkeypatch.setattr(commands.time, "sleep", deliver)
    shown = command.says("status", "short", "--follow")
    assert looks == 4
    assert "short is finished" in shown


def test_a_held_campaign_says_why(command: Command, engine: sa.Engine) -> None:
    make_campaign(engine, "held", state="sending", held="bounce rate 12 %")
    assert "held is sending; the campaign is held: bounce rate 12 % (mail-pipelines, 2026-03-02 09:00 UTC)" in command.says("status", "held")
    assert "sending (held)" in command.says("list")
    assert "held is sending" in command.says("resume", "held")
    assert load(engine, "held").hold is None
