"""`mail-pipelines segment …` as an operator types it."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from mail_pipelines.commands import context
from mail_pipelines.commands.segment import app
from mail_pipelines.segments.saved import SegmentError
from mail_pipelines.segments.store import SnapshotMissing
from tests.segments.world import World

CRITERIA = "key: berlin\nname: Berliners\ncriteria:\n  field: city\n  op: '='\n  value: Berlin\n"


@pytest.fixture
def command(database_url: str, engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", database_url)
    monkeypatch.setenv("MAIL_PIPELINES_SNAPSHOTS__FOLDER", str(tmp_path / "snapshots"))
    monkeypatch.setenv("MAIL_PIPELINES_SNAPSHOTS__MIN_FREE_MB", "0")
    context.settings.cache_clear()
    World(engine, tmp_path).set_up().contacts(
        [(number, {"city": "Berlin" if number < 4 else "Bonn", "@provider": "google" if number == 1 else "gmx"}, []) for number in range(1, 6)]
    )
    (tmp_path / "berlin.yaml").write_text(CRITERIA)
    return CliRunner()


def test_a_segment_is_saved_listed_shown_and_counted(command: CliRunner, tmp_path: Path) -> None:
    assert "saved segment berlin" in command.invoke(app, ["save", str(tmp_path / "berlin.yaml")]).stdout
    assert "Berliners" in command.invoke(app, ["list"]).stdout
    assert command.invoke(app, ["show", "berlin"]).stdout == CRITERIA
    assert isinstance(command.invoke(app, ["count", "berlin"]).exception, SnapshotMissing)
    refreshed = command.invoke(app, ["refresh"])
    assert refreshed.exit_code == 0, refreshed.exception
    assert "contacts: version 1, 5 rows" in refreshed.stdout
    assert "engagement: version 1, 0 rows" in refreshed.stdout
    counted = command.invoke(app, ["count", "berlin"]).stdout
    assert "Berliners: 3 contacts" in counted
    assert [line.split("│")[1].split() for line in counted.splitlines() if line.startswith("│")] == [["gmx"], ["google"]]
    assert "66.7%" in counted
    assert "contacts version 1 of" in counted


def test_a_name_is_shown_as_it_is(command: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "berlin.yaml").write_text(CRITERIA.replace("Berliners", "Old [/red] list"))
    command.invoke(app, ["save", str(tmp_path / "berlin.yaml")])
    assert "Old [/red] list" in command.invoke(app, ["list"]).stdout
    command.invoke(app, ["refresh"])
    assert "Old [/red] list: 3 contacts" in command.invoke(app, ["count", "berlin"]).stdout


def test_a_mistake_ends_with_the_projects_error(command: CliRunner, tmp_path: Path) -> None:
    assert isinstance(command.invoke(app, ["show", "bonn"]).exception, SegmentError)
    assert isinstance(command.invoke(app, ["save", str(tmp_path / "none.yaml")]).exception, SegmentError)
