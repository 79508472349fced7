"""The same beside a real Exim."""

from __future__ import annotations

import pytest

from tests.dispatch.test_settler import (  # noqa: F401 (collected here for the other kind)
    test_a_killed_sessions_claims_are_settled_by_the_server_itself,
    test_a_late_line_ends_the_doubt_within_seconds,
)

# The catcher has it on both databases.
pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]
