"""Fixtures of the tests that send: which kind of server they send through, and the servers they start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dispatch.world import Servers


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Long attacks marked `crosswise` have each kind of server and each database, and not all pairs of them: Exim's module takes SQLite."""
    if metafunc.definition.get_closest_marker("crosswise") and not metafunc.module.__name__.startswith("tests.dispatch.exim."):
        metafunc.definition.add_marker(pytest.mark.parametrize("database_url", ["mariadb"], indirect=True))


@pytest.fixture
def kind() -> str:
    """The kind of the servers: `tests/dispatch/exim` runs the same tests with another one."""
    return "catcher"


@pytest.fixture
def running() -> Iterator[Servers]:
    started = Servers()
    yield started
    started.stop()
