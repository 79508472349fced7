"""Fixtures of the tests that send: which kind of server they send through, and the servers they start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dispatch.world import Attack, Servers


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Long attacks marked `crosswise` go through the pairs that are used: the embedded default, catcher and SQLite; and Exim's module with MariaDB."""
    if metafunc.definition.get_closest_marker("crosswise") and not metafunc.module.__name__.startswith("tests.dispatch.exim."):
        metafunc.definition.add_marker(pytest.mark.parametrize("database_url", ["sqlite"], indirect=True))


@pytest.fixture
def kind() -> str:
    """The kind of the servers: `tests/dispatch/exim` runs the same tests with another one."""
    return "catcher"


@pytest.fixture
def running() -> Iterator[Servers]:
    started = Servers()
    yield started
    started.stop()


@pytest.fixture
def on_senders() -> Attack:
    """How much is sent, and how often a sender is killed meanwhile."""
    return Attack(recipients=1500, kills=16, connections=6, per_second=150.0)


@pytest.fixture
def on_servers() -> Attack:
    """The same of the mail server."""
    return Attack(recipients=900, kills=10, connections=6, per_second=120.0)
