"""Shards: the fixed slices of an audience, each a partition of send runs. How many there are, and which one a contact is in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

MAX_SHARDS = 64
# A smaller shard would be a run that starts for nothing, a larger one a run that ends late.
RECIPIENTS_PER_SHARD = 5_000


def shards_for(audience_size: int) -> int:
    """How many shards an audience uses: a power of two from 1 to 64, of at least 5,000 recipients each; 64 from 320,000 on."""
    fitting = max(1, min(MAX_SHARDS, audience_size // RECIPIENTS_PER_SHARD))
    return 1 << (fitting.bit_length() - 1)


def shard_of(contact_id: int, shards: int) -> int:
    """The shard of a contact among `shards` in use; the same for ever, whatever else changes."""
    return _mix(contact_id) % shards


def _mix(number: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit of a 64-bit number depends on every other."""
    mask = (1 << 64) - 1
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & mask
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & mask
    return number ^ (number >> 31)


def shards_of(contact_ids: pa.Array, shards: int) -> pa.Array:
    """`shard_of` for a column of contact ids, as int8."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def number(value: int) -> pa.Scalar:
        return pa.scalar(value, pa.uint64())

    mixed = contact_ids.cast(pa.uint64())
    # Arrow's unchecked multiplication wraps at 64 bits, as wanted.
    mixed = pc.multiply(pc.bit_wise_xor(mixed, pc.shift_right(mixed, number(30))), number(0xBF58476D1CE4E5B9))
    mixed = pc.multiply(pc.bit_wise_xor(mixed, pc.shift_right(mixed, number(27))), number(0x94D049BB133111EB))
    mixed = pc.bit_wise_xor(mixed, pc.shift_right(mixed, number(31)))
    return pc.bit_wise_and(mixed, number(shards - 1)).cast(pa.int8())
