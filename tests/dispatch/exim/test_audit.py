"""The audit of a real Exim's log."""

from __future__ import annotations

import pytest

from tests.dispatch.test_audit import (  # noqa: F401 (collected here for the other kind)
    test_log_and_ledger_agree_after_an_ordinary_session,
)

# The catcher has it on both databases.
pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]
