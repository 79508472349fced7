"""The benchmark measures what it says: a 35 KB template with 6 variables, both ways making the same message."""

from __future__ import annotations

import pytest

from mail_pipelines.benchmarks import compose, sign
from mail_pipelines.messages.compiled import Pieces
from mail_pipelines.messages.composing import compose as compose_one


def test_the_benchmark_composes_a_large_template_with_six_variables() -> None:
    message = compose.compiled()
    assert isinstance(message.html, Pieces)
    assert 33_000 < len("".join(message.html.literals)) < 37_000
    assert len({*message.variables, "email"}) == 6
    assert len(message.link_ids) == 12


def test_composing_is_compared_with_the_standard_library_in_the_same_run() -> None:
    (result,) = compose.run(quick=True)
    assert (result.name, result.unit, result.target) == ("compose", "messages/s", 50)
    # Far below the target, so that a busy machine does not fail the test.
    assert result.ratio > 15


@pytest.mark.slow
def test_signing_is_compared_with_raw_signatures_and_with_dkimpy_in_the_same_run() -> None:
    message = compose_one(compose.compiled(sign.OFFERS), next(compose.recipients()), compose.SENDER)
    assert 15_000 < len(message.data) < 18_000
    raw, dkimpy = sign.run(quick=True)
    assert (raw.name, raw.target, dkimpy.name) == ("compose and sign", 0.75, "compose and sign, standard library and dkimpy")
    # Far below the targets, so that a busy machine does not fail the test.
    assert raw.ratio > 0.3
    assert dkimpy.ratio > 3
