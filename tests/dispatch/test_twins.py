"""Hosts that are not what they seem: a clock that is wrong, a name that is started twice, a disk that was cloned. Counted at the far end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import database_now, reading
from mail_pipelines.database.models import CampaignMinute, Claim, State
from mail_pipelines.dispatch import servers
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.test_crashes import check_promise
from tests.dispatch.world import Servers, World, make_world, write_play
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.crosswise]

OFF_SECONDS = 300
_SESSION = "import sys; from tests.dispatch import sessions; sessions.run_here(*sys.argv[1:])"


def other_time(seconds: int) -> dict[str, str]:
    """The environment of processes on a host whose clock is so much ahead."""
    (library,) = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
    return {"LD_PRELOAD": str(library), "FAKETIME": f"{seconds:+d}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


@pytest.mark.parametrize("off", [-OFF_SECONDS, OFF_SECONDS], ids=["late", "early"])
def test_a_server_whose_clock_is_five_minutes_off_sends_as_the_others(
    engine: sa.Engine, tmp_path: Path, kind: str, running: Servers, monkeypatch: pytest.MonkeyPatch, off: int
) -> None:
    """What is due, leased, granted and counted goes by the database's clock."""
    recipients = 240
    monkeypatch.setenv("MAIL_PIPELINES_SERVER__HEARTBEAT_SECONDS", "1")
    world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind)
    play = write_play(tmp_path / "play.toml", refuse_percent=4, greylist_percent=10, greylist_seconds=2, drop_percent=2)
    right, wrong = (world.server(key, connections=4, per_second=5.0) for key in ("right", "wrong"))
    running.start(world, right, play)
    with pytest.MonkeyPatch.context() as there:
        for name, value in other_time(off).items():
            there.setenv(name, value)
        running.start(world, wrong, play)
        environ = dict(os.environ)
    begin = time.time()
    words = [wrong.key, str(world.campaign_id), world.campaign_key, "0", "run-wrong"]
    other = subprocess.Popen([sys.executable, "-c", _SESSION, *words], env=environ, cwd=Path(__file__).parents[2])
    wait_for(world.kept, seconds=60, what="the first message")
    SessionProcess(world, right.key, "run-right").wait()
    assert other.wait(60) == 0
    SessionProcess(world, right.key, "rest").wait()
    states = check_promise(world, recipients)
    assert set(states.values()) <= {State.DELIVERED, State.BOUNCED, State.UNKNOWN}
    world.check_counters()
    with reading(engine) as connection:
        by_server = dict(connection.execute(sa.select(Claim.server_id, sa.func.sum(Claim.size)).group_by(Claim.server_id)).tuples().all())
        minutes = connection.execute(sa.select(CampaignMinute.minute).distinct()).scalars().all()
        silent = [server.key for server in servers.all_servers(connection) if server.is_silent(database_now(connection), 1)]
    # Both had a share, and the statistics are of these minutes.
    assert min(by_server[right.id], by_server[wrong.id]) > recipients / 10
    assert [minute for minute in minutes if not begin // 60 <= minute <= time.time() // 60] == []
    assert silent == []


def refused(world: World, *words: str, environ: dict[str, str]) -> str:
    """What a command says that must not start."""
    done = subprocess.run([sys.executable, "-m", "mail_pipelines.cli", *words], env=os.environ | environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0, done.stdout
    return done.stdout + done.stderr


def test_a_second_start_and_a_cloned_disk_stop_themselves_and_the_first_goes_on(
    engine: sa.Engine, tmp_path: Path, kind: str, running: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipients = 120
    monkeypatch.setenv("MAIL_PIPELINES_SERVER__HEARTBEAT_SECONDS", "1")
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
    # A reboot empties /run.
    shutil.copytree(settings.log_folder, clone["MAIL_PIPELINES_SERVER__LOG_FOLDER"], ignore=shutil.ignore_patterns("*.sock"))
    assert "another process speaks for server s1" in refused(world, *start, environ=clone)
    assert session.wait() == "the shard is final"
    assert world.copies() == dict.fromkeys(range(1, recipients + 1), 1)
    assert world.states() == {State.DELIVERED: recipients}
