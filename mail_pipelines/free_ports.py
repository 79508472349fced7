"""Ports for servers that are started in a moment, by a process that is told the number."""

from __future__ import annotations

import random
import socket

# Below those that the kernel gives to whoever connects: one of these would be somebody's connection before the server has begun, on a busy host.
_PORTS = range(10_000, 32_768)


def free_port(host: str = "127.0.0.1") -> int:
    """A port at which nobody listens. Raises `OSError` if there is none, or the address is not this host's."""
    error = OSError("no port is free")
    for port in random.sample(_PORTS, 100):
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
