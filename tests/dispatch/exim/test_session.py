"""Whole sessions through real Exim, in cutthrough mode, to destinations that a catcher plays: what holds for the catcher holds here."""

from __future__ import annotations

import pytest

from tests.dispatch.test_session import (  # noqa: F401 (collected here for the other kind)
    start,
    test_a_server_that_never_answers_ends_the_session_with_everything_unsent,
    test_a_session_sends_the_retries_of_an_urgent_campaign_and_goes_on,
    test_a_stop_acts_within_five_seconds_at_full_speed,
    test_an_address_suppressed_while_sending_is_not_mailed,
    test_everybody_gets_one_message,
    test_refusals_end_as_bounced_and_deferrals_come_back,
    test_refusals_keep_the_destinations_code_and_words,
    test_silence_and_drops_after_the_body_are_unknown_and_never_sent_again,
    test_the_message_names_its_recipient_and_its_sender,
)

# The catcher has it on both databases.
pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]
