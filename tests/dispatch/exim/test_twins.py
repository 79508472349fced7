"""The same with Exim: a second one does not start either."""

import pytest

from tests.dispatch.test_twins import test_a_second_start_and_a_cloned_disk_stop_themselves_and_the_first_goes_on  # noqa: F401

# As in production. With the catcher it is tried on SQLite (`crosswise`).
pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]
