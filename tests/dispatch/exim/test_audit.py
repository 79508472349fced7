"""The audit of a real Exim's log."""

from __future__ import annotations

import pytest

from tests.dispatch.test_audit import (  # noqa: F401 (collected here for the other kind)
    test_a_reply_that_comes_after_the_sender_gave_up_is_found_by_the_audit,
    test_log_and_ledger_agree_after_an_ordinary_session,
)

pytestmark = pytest.mark.server
