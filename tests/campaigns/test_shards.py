"""Shards are stable, even, and as many as the audience needs."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_pipelines.campaigns.shards import MAX_SHARDS, shard_of, shards_for, shards_of


@pytest.mark.parametrize(
    ("audience", "shards"), [(0, 1), (1, 1), (9_999, 1), (10_000, 2), (20_000, 4), (100_000, 16), (319_999, 32), (320_000, 64), (10_000_000, 64)]
)
def test_the_number_of_shards_follows_the_audience(audience: int, shards: int) -> None:
    assert shards_for(audience) == shards


@given(st.integers(0, 20_000_000))
def test_the_number_is_a_power_of_two_and_shards_are_worth_a_run(audience: int) -> None:
    shards = shards_for(audience)
    assert 1 <= shards <= MAX_SHARDS
    assert shards & (shards - 1) == 0
    assert shards == 1 or audience / shards >= 5_000
    assert shards == MAX_SHARDS or audience / shards < 10_000


@given(st.lists(st.integers(0, 2**63 - 1), max_size=50), st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
def test_a_column_of_contacts_is_sharded_as_each_of_them(contact_ids: list[int], shards: int) -> None:
    assert shards_of(pa.array(contact_ids, pa.int64()), shards).to_pylist() == [shard_of(contact_id, shards) for contact_id in contact_ids]


@pytest.mark.parametrize("step", [1, 2, 64, 55, 1000])
def test_shards_are_even_whatever_the_pattern_of_ids(step: int) -> None:
    counts = Counter(shards_of(pa.array(range(0, 320_000 * step, step), pa.int64()), 64).to_pylist())
    assert len(counts) == 64
    assert max(counts.values()) < 5_000 * 1.1
    assert min(counts.values()) > 5_000 * 0.9


def test_the_shard_of_a_contact_never_changes() -> None:
    """Ledgers in production hold these."""
    assert [shard_of(contact_id, 64) for contact_id in (1, 2, 3, 1_000_000, 2**40)] == [37, 10, 48, 22, 56]
