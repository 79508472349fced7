"""What is taken and what is refused, by a real Exim with a real verifier beside it."""

from __future__ import annotations

import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from mail_pipelines.messages.tokens import DeliveryToken, sign_delivery
from tests.inbound.receiving import KEY, Receiving

pytestmark = pytest.mark.server
TOKEN = sign_delivery(DeliveryToken(7, 12, 1), KEY.encode())


def forged(count: int) -> list[str]:
    draw = random.Random(5)
    letters = "abcdefghijklmnopqrstuvwxyz234567"
    tokens = ["".join(draw.choices(letters, k=48)) for _ in range(count // 2)]
    # As near as can be: another letter somewhere in a token that verifies, in the part that names people or in the hash.
    while len(tokens) < count:
        place = draw.randrange(48)
        if (letter := draw.choice(letters)) != TOKEN[place]:
            tokens.append(TOKEN[:place] + letter + TOKEN[place + 1 :])
    return [f"{draw.choice('bu')}+{token}@bounces.example.test" for token in tokens]


def test_forged_recipients_are_refused_and_none_is_stored(receiving: Receiving) -> None:
    before = receiving.stored()
    recipients = forged(10_000)
    groups = [recipients[start : start + 100] for start in range(0, len(recipients), 100)]
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        replies = [reply for group in pool.map(receiving.offer, groups) for reply in group]
    print(time.monotonic() - began)
    assert Counter(replies) == {b"550 5.1.1 no such address": 10_000}
    assert receiving.stored() == before
