"""The stable sample of contacts: a hash of contact id and seed that any part can compute again, in any version of any library.

A 32-bit mixer (xor, shift, multiply; constants of the hash-prospector project, both below 2**31) whose every product
fits in 63 bits, so that the query engine computes it in plain 64-bit integers.
"""

from __future__ import annotations

import hashlib

MASK = 0xFFFFFFFF
# (shift, multiplier) of the rounds; the last round only shifts.
ROUNDS = ((16, 0x21F0AAAD), (15, 0x735A2D97))
LAST_SHIFT = 15


def seed_number(seed: str) -> int:
    """32 bits of a seed given as text."""
    return int.from_bytes(hashlib.sha256(seed.encode("utf-8", "surrogatepass")).digest()[:4], "big")


def threshold(percent: float) -> int:
    """Contacts whose hash is below this are in the sample."""
    return round(percent / 100 * (MASK + 1))
