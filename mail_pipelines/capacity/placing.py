"""The second stage of the near plan: what goes to one provider in each slot, shared among the servers, in whole messages and under each server's own limits.

With the amounts of the first stage this is their split. Without them it is a plan of its own, the one made when the solver fails: whoever is most urgent
takes what there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mail_pipelines.capacity.aggregate import FROZEN_SLOTS, Amounts, Item
from mail_pipelines.capacity.lines import Counts, Rooms

Grants = NDArray[np.int64]


def place(
    items: Sequence[Item],
    rooms: Rooms,
    pool_lines: Sequence[Counts],
    amounts: Mapping[tuple[int, int], Amounts] | None = None,
    previous: Mapping[tuple[int, int], int] | None = None,
) -> Grants:
    """Messages by item, slot and line: I × S × V. `pool_lines` are the numbers of the lines of each pool; `amounts` is what `aggregate.solve` returns.

    No line gets more than its room in any slot, hour or day, no item more than its rows, and none before its first slot or in one in which its send window
    is closed; no campaign more than `previous` of a slot that is frozen. What does not fit into its slot goes to the next.
    """
    slots = rooms.slot.shape[1]
    placed = np.zeros((len(items), slots, rooms.slot.shape[0]), dtype=np.int64)
    hour, day = rooms.hour.copy(), rooms.day.copy()
    left = np.array([item.rows for item in items], dtype=np.int64)
    order = sorted(range(len(items)), key=lambda number: items[number].rank)
    due = None if amounts is None else _whole(amounts, order)
    parts = [item.opens(slots) for item in items]
    # What did not fit into the slots before, or less than nothing of who got one too early.
    late: dict[tuple[int, int], int] = {}
    frozen = {place: count for place, count in (previous or {}).items() if place[1] < FROZEN_SLOTS}
    for slot in range(slots):
        in_hour, in_day = rooms.hour_of[slot], rooms.day_of[slot]
        room = np.minimum(rooms.slot[:, slot], np.minimum(hour[:, in_hour], day[:, in_day]))
        for number in order:
            item = items[number]
            part = parts[number][slot]
            if not part or not left[number]:
                continue
            for pool in item.pools:
                lines = pool_lines[pool]
                key = number, pool
                owed = int(left[number]) if due is None else late.get(key, 0) + (int(due[key][slot]) if key in due else 0)
                wanted = max(0, min(int(left[number]), owed))
                most = wanted if part == 1.0 else min(wanted, int(part * rooms.effective[lines, slot].sum()))
                if (mine := (item.campaign_id, slot)) in frozen:
                    most = min(most, frozen[mine])
                shares = split(most, room[lines])
                given = int(shares.sum())
                if mine in frozen:
                    frozen[mine] -= given
                room[lines] -= shares
                placed[number, slot, lines] += shares
                left[number] -= given
                late[key] = owed - given
        used = placed[:, slot].sum(axis=0)
        hour[:, in_hour] -= used
        day[:, in_day] -= used
    return placed


def split(amount: int, rooms: Counts) -> Counts:
    """An amount in whole messages over servers that have these rooms, each filled to the same part; as much of it as fits.

    The largest remainders get one message more, of equal ones the first.
    """
    total = int(rooms.sum())
    if amount >= total or not total:
        return rooms.copy() if amount >= total else np.zeros_like(rooms)
    shares = rooms * amount // total
    remainders = rooms * amount % total
    missing = amount - int(shares.sum())
    if missing:
        # As much is missing as remainders add up to, so those that get one more have a remainder, and room for it.
        shares[np.argsort(-remainders, kind="stable")[:missing]] += 1
    return shares


def _whole(amounts: Mapping[tuple[int, int], Amounts], order: Sequence[int]) -> dict[tuple[int, int], Counts]:
    """Amounts by (item, pool) and slot in whole messages: what a pool's items have together up to a slot is rounded, one item more at a time in this order.

    So no room of the pool is lost between items, and each has its sum in the end. In a slot one may have less than nothing: it had one too early.
    """
    found: dict[tuple[int, int], Counts] = {}
    for pool in {pool for _, pool in amounts}:
        keys = [key for number in order if (key := (number, pool)) in amounts]
        together = np.round(np.cumsum(np.cumsum([amounts[key] for key in keys], axis=1), axis=0)).astype(np.int64)
        found |= dict(zip(keys, np.diff(np.diff(together, axis=0, prepend=0), axis=1, prepend=0), strict=True))
    return found
