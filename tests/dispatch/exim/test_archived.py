"""Servers that are gone after a restore, through real Exim. It takes a minute until a piece is due."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import State
from mail_pipelines.dispatch import audit, servers
from mail_pipelines.dispatch.archive import Archive
from mail_pipelines.dispatch.registry import ServerStateError
from mail_pipelines.dispatch.servers import ServerInfo
from mail_pipelines.dispatch.session import journal_of
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.test_archived import _settings_of_this_test  # noqa: F401 (a fixture)
from tests.dispatch.test_crashes import check_promise, states_by_contact
from tests.dispatch.test_hold_commands import says
from tests.dispatch.test_recovery import recover
from tests.dispatch.world import Servers, make_world, write_play
from tests.parts.backups import Backup
from tests.parts.processes import wait_for


def told(engine: sa.Engine, key: str) -> ServerInfo:
    with reading(engine) as connection:
        return servers.find(connection, key)


@pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)
@pytest.mark.server
@pytest.mark.timeout(600)
def test_one_server_retires_and_is_gone_another_is_destroyed(
    engine: sa.Engine, tmp_path: Path, kind: str, running: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both after the backup, with their logs: of what they mailed nothing waits to be mailed again."""
    recipients = 400
    archive_folder = tmp_path / "archive"
    archive_folder.mkdir()
    monkeypatch.setenv("MAIL_PIPELINES_SERVER__LOG_ARCHIVE", str(archive_folder))
    monkeypatch.setenv("MAIL_PIPELINES_SERVER__HEARTBEAT_SECONDS", "1")
    world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind)
    world.settings = config.load()
    play = write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.3], refuse_percent=4)
    fleet = [world.server(key, connections=3, per_second=40.0) for key in ("retires", "destroyed")]
    processes = [running.start(world, server, play) for server in fleet]
    wait_for(lambda: all((told(engine, server.key).health or {}).get("shipped") for server in fleet), what="heartbeats")
    sessions = [SessionProcess(world, server.key, f"first-{server.key}") for server in fleet]
    wait_for(lambda: len(world.kept()) > 30, what="sending")
    backup = Backup(engine)
    wait_for(lambda: len(world.kept()) > 150, what="sending")
    says("server", "drain", "retires")
    sessions[0].wait()
    sessions[1].kill()
    journal = journal_of(world.folders("retires"), fleet[0].kind)

    def retires() -> bool:
        audit.run(engine, world.settings, fleet[0], journal, dt.datetime.now(dt.UTC))
        try:
            return says("server", "retire", "retires") == "server retires is retired\n"
        except ServerStateError:
            # Something of its log is not read or not shipped yet.
            return False

    wait_for(retires, what="the end of the log in the archive")
    archive = Archive(str(archive_folder))
    wait_for(lambda: archive.pieces("destroyed", world.folders("destroyed").incarnation()), what="a piece of the other")
    processes[1].kill()
    processes[0].stop()
    mailed = world.copies()
    for server in fleet:
        for path in world.folders(server.key).log.glob("main.log*"):
            path.unlink()
    backup.restore(engine)
    output = recover("--lost", "retires", "--lost", "destroyed")
    assert "offers in its log (from the archive)" in output
    assert "(from the archive; the end of its log was not shipped)" in output
    states = states_by_contact(world)
    assert [contact for contact in mailed if states[contact] in (State.PENDING, State.DEFERRED)] == []
    assert sum(state is State.DELIVERED for state in states.values()) > 50
    assert world.copies() == mailed
    check_promise(world, recipients)
