"""One installation for all tests of a file: both hosts take a minute or more."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.infra.installing import ROOT, Installation, Play, two_machines
from tests.infra.machine import environment

OWN = ROOT / ".venv"
PLACE = Path("/opt/mail-pipelines/.venv")


@pytest.fixture(scope="session")
def tree() -> Path:
    subprocess.run([ROOT / "script/machine"], check=True)
    suite = subprocess.run(["sh", "-c", '. /etc/os-release && echo "$VERSION_CODENAME"'], capture_output=True, text=True, check=True).stdout.strip()
    return ROOT / ".machines" / suite


@pytest.fixture(scope="module")
def hosts(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Two bare hosts. The centre finds the Python packages of these tests where it would install the same ones: that would take most of the time."""
    # Sockets of SSH have short paths.
    folder = tmp_path_factory.mktemp("h")
    files = folder / "files"
    environment(OWN, PLACE, tree, files)
    with two_machines(folder, tree, files, {OWN: str(PLACE)}) as installation:
        yield installation


@pytest.fixture(scope="module")
def first_play(hosts: Installation) -> Play:
    return hosts.play()


@pytest.fixture(scope="module")
def installed(hosts: Installation, first_play: Play) -> Installation:
    assert (first_play.status, first_play.failed) == ("successful", []), first_play.output
    return hosts
