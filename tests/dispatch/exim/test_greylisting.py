"""Destinations that greylist, behind two real Exims."""

from __future__ import annotations

import pytest

from tests.dispatch.test_greylisting import test_whoever_greylists_hears_again_from_the_same_server  # noqa: F401 (collected here for the other kinds)

# The catcher has it on both databases.
pytestmark = [
    pytest.mark.server,
    pytest.mark.parametrize("database_url", ["mariadb"], indirect=True),
    pytest.mark.parametrize("kind", ["exim", "burst"]),
]
