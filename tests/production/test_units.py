"""The units of systemd, as systemd reads them."""

from __future__ import annotations

import configparser
import functools
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mail_pipelines import code_server
from mail_pipelines.config import SendingSettings
from mail_pipelines.resources import execution

ROOT = Path(__file__).resolve().parent.parent.parent
UNITS = sorted((ROOT / "infra/systemd").glob("*.service"))
WORKSPACE = ROOT / "infra/dagster/production/workspace.yaml"
INSTALLED = "/opt/mail-pipelines/.venv/bin"


@pytest.mark.server
def test_systemd_finds_nothing_to_say_about_them(tmp_path: Path) -> None:
    for unit in UNITS:
        (tmp_path / unit.name).write_text(unit.read_text(encoding="utf-8").replace(INSTALLED, str(Path(sys.executable).parent)), encoding="utf-8")
    files = [str(tmp_path / unit.name) for unit in UNITS]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *files], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@functools.cache
def help_of(program: str, *command: str) -> str:
    done = subprocess.run([Path(sys.executable).parent / program, *command, "--help"], capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_starts_what_there_is_and_is_restarted(unit: Path) -> None:
    # A key may be given twice in a unit.
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(unit.read_text(encoding="utf-8"))
    service = parser["Service"]
    program, *words = service["ExecStart"].split()
    assert program.startswith(INSTALLED)
    options = [word for word in words if word.startswith("-")]
    if words[0] == "-m":
        command, options = words[:3], options[1:]
    else:
        depth = 0 if Path(program).name == "dagster-webserver" else 2
        command = [word for word in words if not word.startswith(("-", "$"))][:depth]
    described = help_of(Path(program).name, *command)
    assert all(re.search(rf"(?<![\w-]){re.escape(option)}\b", described) for option in options), described
    assert service["Restart"] == "always"
    assert service["MemoryMax"]
    assert service["EnvironmentFile"] == "/etc/mail-pipelines/environment"


def test_the_centres_processes_share_the_code_server_of_its_unit() -> None:
    started = {unit.stem.removeprefix("mail-pipelines-"): _words_after(unit, "ExecStart=") for unit in UNITS}
    code = dict(itertools.pairwise(started["code"]))
    (location,) = yaml.safe_load(WORKSPACE.read_text(encoding="utf-8"))["load_from"]
    assert location["grpc_server"] == {"socket": code["--socket"], "location_name": code["--location-name"]}
    assert Path(code["--socket"]).parent == Path("/run", *_words_after(ROOT / "infra/systemd/mail-pipelines-code.service", "RuntimeDirectory="))
    # Workers execute runs of no other.
    assert code["--module-name"] == execution._DEFINITIONS
    assert code["--location-name"] == code_server.LOCATION
    told = {name: ROOT / words[words.index("-w") + 1] for name, words in started.items() if "-w" in words}
    assert told == dict.fromkeys(("daemon", "viewer", "web"), WORKSPACE)


def _words_after(unit: Path, key: str) -> list[str]:
    (line,) = (line for line in unit.read_text(encoding="utf-8").splitlines() if line.startswith(key))
    return line.removeprefix(key).split()


def test_a_session_that_is_told_to_end_has_the_time_to() -> None:
    """What a reply may take, and the results after it, before systemd or Dagster give it up."""
    text = (ROOT / "infra/systemd/mail-pipelines-worker.service").read_text(encoding="utf-8")
    found = re.search(r"^TimeoutStopSec=(\d+)$", text, re.M)
    assert found is not None
    monitoring = yaml.safe_load((ROOT / "infra/dagster/production/dagster.yaml").read_text(encoding="utf-8"))["run_monitoring"]
    needed = 2 * SendingSettings().reply_timeout_seconds
    assert needed < monitoring["cancel_timeout_seconds"] < int(found[1])
