"""One receiving process for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.inbound.receiving import Receiving


@pytest.fixture(scope="module")
def receiving(_sqlite_template: Path) -> Iterator[Receiving]:
    receiving = Receiving(_sqlite_template)
    yield receiving
    receiving.end()
