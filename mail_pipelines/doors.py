"""Open doors: which of our ports other hosts can reach although what answers there asks for no login.

What belongs here: finding what listens on this host, whose it is, and what to do about it. What does not: firewalls, which may close a door that
looks open; nobody on this host can tell.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import sqlalchemy as sa

from mail_pipelines.config import Settings
from mail_pipelines.dispatch.servers import ServerInfo

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_LISTENING = "0A"
# How a process of Dagster's web server begins: its program, its module, or the command that starts one.
_WEB_SERVER = re.compile(r"(^|/)(dagster-webserver|dagit)$|^dagster_webserver$")
_ERLANG = "nothing but a cluster of brokers needs it: put it on the loopback (docs/production.md)"
# Ports of RabbitMQ that no server needs, in Debian's installation as in any other.
_BROKER = {
    15672: ("RabbitMQ's management page", "set management.tcp.ip = 127.0.0.1 in rabbitmq.conf"),
    15671: ("RabbitMQ's management page", "set management.ssl.ip = 127.0.0.1 in rabbitmq.conf"),
    15692: ("RabbitMQ's metrics", "set prometheus.tcp.ip = 127.0.0.1 in rabbitmq.conf"),
    25672: ("RabbitMQ's port for other nodes", _ERLANG),
    4369: ("Erlang's port mapper", _ERLANG),
}


@dataclass(frozen=True)
class Listener:
    """A TCP port that is listened on. `inode` is its socket's."""

    address: Address
    port: int
    inode: int

    @property
    def is_open(self) -> bool:
        """Whether it can be reached from another host."""
        mapped = self.address.ipv4_mapped if isinstance(self.address, ipaddress.IPv6Address) else None
        return not (mapped or self.address).is_loopback

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.address.version == 6 else f"{self.address}:{self.port}"


@dataclass(frozen=True)
class Door:
    """A port that is open and should not be."""

    what: str
    listener: Listener
    remedy: str


def open_doors(settings: Settings, servers: Collection[ServerInfo], listeners: Iterable[Listener] | None = None) -> Iterator[Door]:
    """Our ports that other hosts can reach and should not; `servers` are the registered ones whose log is on this host."""
    found = sorted((one for one in (listening() if listeners is None else listeners) if one.is_open), key=lambda one: (one.port, one.address.version))
    if not found:
        return
    owners = _owners()
    own = {server.port: server.key for server in servers if settings.inbound.port != server.port}
    for listener in found:
        port = listener.port
        # Where this user may not see whose it is, the port has to do.
        if owners.get(listener.inode, port == settings.operation.ui_port):
            yield Door(
                "a web server of Dagster", listener, "whoever reaches it starts any job: let it listen on 127.0.0.1 (-h, operation.ui_host), behind the proxy"
            )
        elif port in own:
            yield Door(
                f"server {own[port]}", listener, f"only its own host's sessions hand mail to it: `mail-pipelines server add {own[port]} --host 127.0.0.1`"
            )
        elif port in _BROKER:
            what, remedy = _BROKER[port]
            yield Door(what, listener, remedy)
        elif port == settings.metrics.port and (listener.address.is_unspecified or not listener.address.is_private):
            yield Door("metrics", listener, "they ask for no login: set metrics.listen to 127.0.0.1, or to an address of a private network")
        elif port == _database_port(settings):
            yield Door("the database", listener, "no other host needs it: set bind_address = 127.0.0.1 in its configuration")


def _database_port(settings: Settings) -> int | None:
    """The port of a database on this host that no other host has to reach; with a broker, servers on other hosts do."""
    if settings.broker.url and urlsplit(settings.broker.url).scheme != "filesystem":
        return None
    with contextlib.suppress(sa.exc.ArgumentError):
        url = sa.make_url(settings.database.url)
        if url.get_backend_name() != "sqlite" and url.host in ("127.0.0.1", "::1", "localhost"):
            return url.port or 3306
    return None


def listening(process: str = "self") -> Iterator[Listener]:
    """Everything that listens for TCP in a process's network namespace."""
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/{process}/net/{name}").read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING:
                    address, port = fields[1].split(":")
                    yield Listener(_address(address), int(port, 16), int(fields[9]))


def _address(text: str) -> Address:
    """The address in `/proc/net/tcp`: words of 32 bits as this processor has them in memory, in hexadecimal."""
    words = b"".join(int(text[start : start + 8], 16).to_bytes(4, sys.byteorder) for start in range(0, len(text), 8))
    return ipaddress.ip_address(words)


def _owners() -> dict[int, bool]:
    """Of each socket whose process this user may look at: whether that is a web server of Dagster."""
    found: dict[int, bool] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        # Processes end while one looks, and those of other users are closed books.
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
            is_web_server = any(_WEB_SERVER.search(word) for word in words[:4])
            for inode in _sockets(folder / "fd"):
                found[inode] = found.get(inode, False) or is_web_server
    return found


def _sockets(folder: Path) -> Iterator[int]:
    """The inodes of the sockets among the open files of a process."""
    for handle in folder.iterdir():
        with contextlib.suppress(OSError):
            if match := re.fullmatch(r"socket:\[(\d+)\]", str(handle.readlink())):
                yield int(match[1])
