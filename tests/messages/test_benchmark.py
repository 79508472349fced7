"""The benchmark measures what it says: a 35 KB template with 6 variables, both ways making the same message."""

from __future__ import annotations

from mail_pipelines.benchmarks import compose
from mail_pipelines.messages.compiled import Pieces


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
