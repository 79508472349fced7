"""The same recovery from Exim's own log."""

import pytest

from tests.dispatch.test_recovery import _settings_of_this_test, test_after_a_restore_the_servers_stop_and_recover_completes_the_ledger  # noqa: F401

# As in production. With the catcher it is attacked on SQLite (`crosswise`).
pytestmark = [pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]
