"""One installation for all tests of machines: making it takes a minute of the processor."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.infra.fleet import Fleet, making_itself
from tests.infra.installing import CENTRE, ROOT, SERVER, Installation, Play, installation
from tests.infra.machine import environment

OWN = (ROOT / ".venv").resolve()
# Where the two versions of a host that has had an upgrade are.
FIRST, SECOND = "/opt/mail-pipelines-1/.venv", "/opt/mail-pipelines-2/.venv"
PLACES = {CENTRE: (FIRST,), SERVER: (FIRST, SECOND)}


@pytest.fixture(scope="session")
def tree() -> Path:
    subprocess.run([ROOT / "script/machine"], check=True)
    suite = subprocess.run(["sh", "-c", '. /etc/os-release && echo "$VERSION_CODENAME"'], capture_output=True, text=True, check=True).stdout.strip()
    return ROOT / ".machines" / suite


@pytest.fixture(scope="session")
def hosts(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Bare hosts. Those with the project find the Python packages of these tests where they would install the same ones: that would take most of the time."""
    # Sockets of SSH have short paths.
    folder = tmp_path_factory.mktemp("h")
    files = {name: folder / "files" / name for name in PLACES}
    for name, places in PLACES.items():
        for place in places:
            environment(OWN, Path(place), tree, files[name])
    shown = {name: dict.fromkeys(places, OWN) for name, places in PLACES.items()}
    with installation(folder, tree, files, shown) as running:
        yield running


@pytest.fixture(scope="session")
def first_play(hosts: Installation) -> Play:
    """A centre and a server by one command."""
    return hosts.play("site.yml")


@pytest.fixture(scope="session")
def installed(hosts: Installation, first_play: Play) -> Installation:
    assert (first_play.status, first_play.failed) == ("successful", []), first_play.output
    return hosts


@pytest.fixture(scope="session")
def fleet(installed: Installation, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A centre that makes its servers itself. Its tests come last: they change what the others look at."""
    with making_itself(installed, tree, tmp_path_factory.mktemp("r")) as running:
        yield running
