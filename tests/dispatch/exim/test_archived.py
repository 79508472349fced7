"""The same of two servers with Exim."""

import pytest

from tests.dispatch.test_archived import _settings_of_this_test, archive_folder, test_one_server_retires_and_is_gone_another_is_destroyed  # noqa: F401

# As in production. With the catcher it is attacked on SQLite (`crosswise`).
pytestmark = [pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]
