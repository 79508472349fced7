"""Free ports of this machine for servers that are started a moment later, and that may be stopped and come back."""

from __future__ import annotations

import functools
import itertools
import os
import random
import socket
from collections.abc import Iterator

# Below those that the system itself hands out (32768 and up): nobody who asks it for any port, or connects somewhere, gets one of ours before its server
# listens, or while that is away.
_FIRST, _IN_A_BLOCK, _BLOCKS = 20_000, 100, 120


def free_port(host: str = "127.0.0.1") -> int:
    """A port at which nobody listens; the one after the last, so that one that was given is not given again soon.

    Raises `OSError` if there is none, or the address is not this host's.
    """
    error = OSError(f"none of {_IN_A_BLOCK} ports is free")
    for port in itertools.islice(_own(os.getpid())[1], _IN_A_BLOCK):
        try:
            check_port(host, port)
        except OSError as taken:
            error = taken
        else:
            return port
    raise error


def check_port(host: str, port: int) -> None:
    """Raise `OSError` if nothing can listen there."""
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
        pass


@functools.cache
def _own(process: int) -> tuple[socket.socket, Iterator[int]]:
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
    raise OSError(f"process {process} finds no free ports: {_BLOCKS} other processes have chosen some, and live")
