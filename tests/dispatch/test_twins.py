"""A server's name that is started twice, and a disk that was cloned: counted at the far end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Server, State
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.world import Servers, World, make_world, write_play
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.crosswise]


def refused(world: World, *words: str, environ: dict[str, str]) -> str:
    """What a command says that must not start."""
    command = [sys.executable, "-m", "mail_pipelines", *words]
    done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0, done.stdout
    return done.stdout + done.stderr


def beat_of(world: World) -> str | None:
    with reading(world.engine) as connection:
        return connection.execute(sa.select(Server.heartbeat_token)).scalar_one()


def test_a_second_start_and_a_cloned_disk_stop_themselves_and_the_first_goes_on(
    engine: sa.Engine, tmp_path: Path, kind: str, running: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipients = 120
    # Whoever is silent for three of them has no name to lose, so not too short for a busy machine.
    monkeypatch.setenv("MAIL_PIPELINES_SERVER__HEARTBEAT_SECONDS", "4")
    world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind)
    server = world.server(connections=2, per_second=15.0)
    play = write_play(tmp_path / "play.toml")
    running.start(world, server, play)
    session = SessionProcess(world, server.key, "run-1")
    wait_for(lambda: len(world.kept()) > 10, what="sending")
    start = ("catcher", "run", server.key) if kind == "catcher" else ("exim", "run", server.key, "--hostname", "mail.example.test")
    assert "already running" in refused(world, *start, environ={})
    settings = world.settings.server
    clone = {f"MAIL_PIPELINES_SERVER__{name}_FOLDER": str(tmp_path / "clone" / name.lower()) for name in ("RUN", "LOG")}
    # A reboot empties /run; and without what is there only until it gets its name.
    passing = shutil.ignore_patterns("*.sock", "heartbeat.*", "*.json.*")
    shutil.copytree(settings.log_folder, clone["MAIL_PIPELINES_SERVER__LOG_FOLDER"], ignore=passing)
    copied = json.loads((Path(clone["MAIL_PIPELINES_SERVER__LOG_FOLDER"]) / server.key / "heartbeat").read_text(encoding="ascii"))["tokens"]
    # Until then both have the same to say.
    wait_for(lambda: beat_of(world) not in copied, what="the next beat of the first")
    assert "another process speaks for server s1" in refused(world, *start, environ=clone)
    assert session.wait() == "the shard is final"
    assert world.copies() == dict.fromkeys(range(1, recipients + 1), 1)
    assert world.states() == {State.DELIVERED: recipients}
