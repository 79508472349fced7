"""The same beside a real Exim."""

from __future__ import annotations

import pytest

from tests.dispatch.test_metrics import test_a_server_and_the_centre_tell_what_the_ledger_has  # noqa: F401 (collected here for the other kind)

# As in production; with the catcher on SQLite (`crosswise`).
pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]
