"""Fixtures of the tests that send: which kind of server they send through, and the servers they start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dispatch.world import Servers


@pytest.fixture
def kind() -> str:
    """The kind of the servers: `tests/dispatch/exim` runs the same tests with another one."""
    return "catcher"


@pytest.fixture
def running() -> Iterator[Servers]:
    started = Servers()
    yield started
    started.stop()
