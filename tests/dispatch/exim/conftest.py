"""The tests of this folder send through Exim."""

from __future__ import annotations

import pytest


@pytest.fixture
def kind() -> str:
    return "exim"
