"""How engaged a recipient is, and the order in which a campaign is sent: lowest first.

Days count while they are few, then weeks, then four weeks. Whoever has the same rank is sent to in the order of contacts, so rows that are
claimed together lie together: the database claims and records them at two thirds of what rows from all over the ledger cost.
"""

from __future__ import annotations

import numpy as np

NEVER_ENGAGED = 9999
# From so many days on, ranks are so many days wide.
_STEPS = ((0, 1), (14, 7), (91, 28))
_CONTACTS_AT_ONE_PLACE, _LAST_PORTION = 1024, 2**16 - 1


def _rank_of_days() -> np.ndarray:
    days = np.arange(NEVER_ENGAGED, dtype=np.int32)
    ranks = np.select([days >= first for first, _ in reversed(_STEPS)], [days // width * width for _, width in reversed(_STEPS)])
    return np.append(ranks, NEVER_ENGAGED).astype(np.int32)


_RANKS = _rank_of_days()


def ranks_of(days: np.ndarray) -> np.ndarray:
    """int32 ranks of whole days since the last engagement (integers from 0 to 9999; `NEVER_ENGAGED`: there was none)."""
    ranks: np.ndarray = _RANKS[days]
    return ranks


def places(ranks: np.ndarray, contact_ids: np.ndarray) -> np.ndarray:
    """int32 places in the order of sending: by rank, then by contact. A claim begins at the place where the last one ended, so few have the same."""
    portions: np.ndarray = np.minimum(contact_ids // _CONTACTS_AT_ONE_PLACE, _LAST_PORTION)
    found: np.ndarray = (ranks * (_LAST_PORTION + 1) + portions).astype(np.int32)
    return found
