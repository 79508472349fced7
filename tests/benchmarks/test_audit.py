"""The audit's benchmark reads a log that the audit understands to its last line."""

from __future__ import annotations

import pytest

from mail_pipelines.benchmarks import audit


@pytest.mark.server
def test_the_log_of_the_benchmark_agrees_with_its_ledger() -> None:
    # Raises if a line is not understood, or disagrees.
    result = audit.measure(600)
    assert (result.name, result.unit) == ("audit of a log", "lines/s")
    assert 0 < result.ratio < 1
