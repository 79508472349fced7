"""Free ports of this machine for servers that are started a moment later, and that may be stopped and come back."""

from __future__ import annotations

import functools
import itertools
import random
import socket
from collections.abc import Iterator

# Below those that the system itself hands out (32768 and up): nobody who asks it for any port, or connects somewhere, gets one of ours before its server
# listens, or while that is away.
_FIRST, _IN_A_BLOCK, _BLOCKS = 20_000, 100, 120


@functools.cache
def _own() -> tuple[socket.socket, Iterator[int]]:
    """A block that no other process chooses from while this one lives: whoever has it holds a name, which the system frees."""
    for block in random.sample(range(_BLOCKS), _BLOCKS):
        holder = socket.socket(socket.AF_UNIX)
        try:
            holder.bind(f"\0mail-pipelines ports {block}")
        except OSError:
            holder.close()
            continue
        first = _FIRST + block * _IN_A_BLOCK
        return holder, itertools.cycle(range(first, first + _IN_A_BLOCK))
    raise OSError(f"{_BLOCKS} processes have chosen free ports and live")


def free_port() -> int:
    """A port at which nobody listens on 127.0.0.1; the one after the last, so that one that was given is not given again soon."""
    _, ports = _own()
    for port in itertools.islice(ports, _IN_A_BLOCK):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"none of {_IN_A_BLOCK} ports is free")
