"""The same through a real Exim."""

from __future__ import annotations

import pytest

from tests.dispatch.test_breakers import test_a_provider_that_blocks_one_server_is_left_alone_and_tried_again  # noqa: F401 (collected here for the other kind)

# The catcher has it on both databases.
pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]
