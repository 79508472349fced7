"""Replies as destinations word them, and what they are taken for."""

from __future__ import annotations

import pytest

from mail_pipelines.delivery.classes import Action, classify
from mail_pipelines.dispatch import greylisting

GREYLISTED = [
    # Postgrey, SQLgrey, gld
    (450, "4.2.0", "4.2.0 <***@shop.test>: Recipient address rejected: Greylisted, see http://postgrey.schweikert.ch/help/shop.test.html"),
    (450, "4.7.1", "4.7.1 <***@shop.test>: Recipient address rejected: Greylisted for 5 minutes"),
    (451, None, "Greylisted, please try again in 300 seconds"),
    # milter-greylist, policyd
    (451, "4.7.1", "4.7.1 Greylisting in action, please come back in 00:05:00"),
    (451, "4.7.1", "4.7.1 Greylisting in effect, please come back later"),
    (421, "4.7.0", "4.7.0 This host is on the grey list"),
    (452, None, "You have been graylisted"),
    # Exim with greylistd
    (451, None, "192.0.2.7 is not yet authorized to deliver mail from <***@shop.test> to <***@small.test>. Please try later."),
    # rspamd, iRedAPD, Plesk
    (451, "4.7.1", "4.7.1 Try again later"),
    (451, "4.7.1", "4.7.1 Intentional policy rejection, please try again later"),
    (451, "4.7.1", "4.7.1 Service unavailable - try again later"),
    # postscreen, Mimecast, spamd
    (450, "4.3.2", "4.3.2 Service currently unavailable"),
    (451, None, "Internal resources are temporarily unavailable - https://community.mimecast.com/docs/DOC-1369#451"),
    (451, None, "Temporary failure, please try again later."),
]


@pytest.mark.parametrize(("code", "enhanced", "text"), GREYLISTED)
def test_greylisting_is_known_by_its_words(code: int, enhanced: str | None, text: str) -> None:
    meaning = classify("other", code, enhanced, text)
    assert (meaning.reason, meaning.action) == (greylisting.REASON, Action.RETRY)


def test_yahoo_says_it_by_a_code_of_its_own() -> None:
    text = "4.3.2 Message temporarily deferred due to unusual activity - [GL01]"
    assert classify("yahoo", 451, "4.3.2", text).reason == greylisting.REASON
    assert classify("other", 451, "4.3.2", text).reason == "transient"


@pytest.mark.parametrize(
    ("provider", "code", "enhanced", "text", "reason"),
    [
        ("google", 421, "4.7.28", "4.7.28 receiving mail at a rate that prevents additional messages; try again later", "rate_limited"),
        ("yahoo", 421, "4.7.0", "4.7.0 [TSS04] Messages temporarily deferred", "rate_limited"),
        ("other", 451, "4.7.1", "4.7.1 Too many messages from your address, try again later", "transient"),
        ("other", 451, "4.3.0", "4.3.0 Temporary lookup failure", "transient"),
        ("other", 452, "4.2.2", "4.2.2 Mailbox full", "quota"),
        # Refused for good: nothing is tried again.
        ("other", 550, "5.1.1", "5.1.1 No such user in the greylist department", "invalid_recipient"),
    ],
)
def test_other_deferrals_are_not_greylisting(provider: str, code: int, enhanced: str, text: str, reason: str) -> None:
    assert classify(provider, code, enhanced, text).reason == reason
