"""The demo empties only a home that a demo has made, and only while no other demo runs in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mail_pipelines import config, up
from mail_pipelines.demo import own_home
from mail_pipelines.home import HomeError, checkout
from mail_pipelines.supervision import ProcessError, Processes


def demo(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """A start that is refused before anything is made."""
    environ = os.environ | settings | {"MAIL_PIPELINES_HOME": str(folder)}
    return subprocess.run([sys.executable, "-m", "mail_pipelines.demo", "--exit", "--contacts", "10"], env=environ, capture_output=True, text=True, timeout=300)


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            process.kill()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_home_that_no_demo_has_made_is_left_as_it_is(tmp_path: Path) -> None:
    home = tmp_path / "real"
    (home / "secrets").mkdir(parents=True)
    (home / "secrets/token_key").write_text("irreplaceable")
    (home / "central.sqlite3").write_text("people")
    before = content(home)
    refused = demo(home)
    assert refused.returncode == 1
    assert "was not made by the demo, which deletes everything in its home: set MAIL_PIPELINES_HOME to a folder that is new or empty" in " ".join(
        refused.stderr.split()
    )
    assert content(home) == before


def test_a_second_demo_is_refused_and_the_first_ones_files_are_there(tmp_path: Path) -> None:
    home = tmp_path / "home"
    own_home.claim(home)
    with Processes(up.lock(home)):
        (home / "log").mkdir()
        (home / "log/daemon.log").write_text("at work")
        before = content(home)
        refused = demo(home)
        assert refused.returncode == 1
        assert "is held by processes of an earlier start" in " ".join(refused.stderr.split())
        assert content(home) == before


def test_the_next_demo_begins_with_an_empty_home_and_the_same_lock(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    for _ in range(2):
        own_home.claim(home)
        with Processes(up.lock(home)):
            own_home.empty(home)
            assert set(content(home)) == {own_home.MARKER, "up.lock"}
            with pytest.raises(ProcessError, match="held by processes"), Processes(up.lock(home)):
                pass
            (home / "snapshots").mkdir()
            (home / "snapshots/contacts").touch()
            (home / "mail").symlink_to(elsewhere)
    assert (elsewhere / "kept").exists()


def test_the_next_demo_ends_the_servers_that_a_killed_one_has_made(tmp_path: Path) -> None:
    """They are processes of their own, which their home names; one that only has the number of such a process is left alone."""
    home = tmp_path / "home"
    own_home.claim(home)
    (home / "run/catchers").mkdir(parents=True)
    # Dagster leaves SIGTERM ignored where its jobs were run, and so would a process that is started there.
    sleep = [sys.executable, "-c", "import signal; signal.signal(signal.SIGTERM, signal.SIG_DFL); print(flush=True); signal.pause()"]
    with started([*sleep, "catcher", "run", "catcher-3"]) as made, started([*sleep, "catcher", "run", "mx9"]) as other:
        for key, process in (("catcher-3", made), ("catcher-4", other)):
            (home / "run/catchers" / key).write_text(f"{process.pid}\n")
        ends = threading.Thread(target=made.wait)
        ends.start()
        own_home.empty(home)
        ends.join()
        assert made.returncode == -signal.SIGTERM
        assert other.poll() is None
    assert set(content(home)) == {own_home.MARKER}


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HomeError, match="file cannot be used: File exists; MAIL_PIPELINES_HOME names the folder to use"):
        own_home.claim(tmp_path / "file")


def test_no_database_and_no_folder_of_another_installation_is_used(tmp_path: Path) -> None:
    home = tmp_path / "home"
    elsewhere = {
        "MAIL_PIPELINES_DATABASE__URL": "mysql+pymysql://mail@db.example.test/mail",
        "MAIL_PIPELINES_DATABASE__PASSWORD_FILE": "/etc/password",
        "MAIL_PIPELINES_OPERATION__INBOX": "/srv/inbox",
        "MAIL_PIPELINES_SERVER__LOG_FOLDER": "/var/log/dispatch",
        "MAIL_PIPELINES_SERVER": "real",
        "MAIL_PIPELINES_OPERATION__UI_PORT": "3000",
        "PATH": "/bin",
    }
    environ = own_home.environment(elsewhere | {"MAIL_PIPELINES_HOME": str(home)})
    settings = config.load(environ)
    assert settings.database.url == f"sqlite:///{home}/central.sqlite3"
    assert settings.database.password is None
    assert settings.operation.inbox == f"{home}/inbox"
    assert settings.server.log_folder == f"{home}/log"
    assert "MAIL_PIPELINES_SERVER" not in environ
    assert (settings.operation.ui_port, settings.operation.sensor_seconds, environ["PATH"]) == (3000, 2, "/bin")
    # What a demo needs itself, no reader changes.
    short = own_home.environment({"MAIL_PIPELINES_PROVISIONING__MODE": "off"}, {"MAIL_PIPELINES_PROVISIONING__MODE": "auto"})
    assert config.load(short | {"MAIL_PIPELINES_HOME": str(home)}).provisioning.mode == "auto"
    assert own_home.environment({})["MAIL_PIPELINES_HOME"] == str(checkout() / ".mail_pipelines_demo")
