"""One receiving process for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.inbound.receiving import Receiving


@pytest.fixture(scope="module")
def receiving() -> Iterator[Receiving]:
    receiving = Receiving()
    yield receiving
    receiving.end()
