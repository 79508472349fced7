"""The same through a real Exim."""

from __future__ import annotations

import pytest

from tests.dispatch.test_unknown import test_evidence_is_shown_and_the_second_copy_has_the_same_message_id  # noqa: F401 (collected here for the other kind)

# The catcher has it on both databases.
pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]
