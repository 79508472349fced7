"""What provisioning needs of others: sources of hosts, whoever installs them, the DNS, verification, accounts.

What belongs here: these interfaces and what passes through them. What does not: any of their implementations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sqlalchemy.engine import Connection, Engine

from mail_pipelines.config import Settings
from mail_pipelines.dispatch.archive import Archive
from mail_pipelines.domains.records import Record
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.provisioning.finding import Finding

# One line of what happens, for a person: the log of a run, or a screen.
Say = Callable[[str], None]


class ProvisioningError(MailPipelinesError):
    """A server cannot be made, or not be given back, as asked. It may be tried again."""


class NoHost(ProvisioningError):
    """A source gives no host now: all are taken, a quota is used up, or the hoster has switched it off. The next source may."""


class CannotBeMade(ProvisioningError):
    """Trying again would not help."""


@dataclass(frozen=True)
class Host:
    """A host of a source. `id` is the source's own name for it, `host_key` the public key that its SSH server has, as in known_hosts."""

    id: str
    address: str
    host_key: str = ""
    user: str = "root"
    key_file: str = ""
    port: int = 22


@dataclass(frozen=True)
class Order:
    """A host that is to be made, or was: `name` is decided before anything is asked for, and the same whenever it is asked again.

    `reserved` is the id chosen by `HostSource.reserve`, if that chooses. `ssh_host_key` is the private key that a new host gets as its SSH server's
    (so its public half is known before the first contact), in the form of OpenSSH.
    """

    name: str
    reserved: str = ""
    ssh_host_key: str = ""


class HostSource(Protocol):
    """Where hosts come from. All methods raise `ProvisioningError`, and `NoHost` for what only another source can mend."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str:
        """What its servers are: exim, or catcher (`database.models.Server.kind`)."""

    @property
    def cost_per_hour(self) -> float: ...

    @property
    def most(self) -> int | None:
        """How many servers at most; None: any number."""

    @property
    def warm(self) -> bool:
        """Whether its addresses have a reputation: then its servers help campaigns that end in hours."""

    @property
    def curve(self) -> str:
        """The curve by which its servers are warmed up; "" if they are not."""

    @property
    def reused(self) -> bool:
        """Whether its hosts stay when they are deleted, for the next server."""

    def reserve(self, taken: Collection[str]) -> str:
        """The id of a host that is none of those `taken`; "" if the source makes hosts when they are ordered."""

    def create(self, order: Order) -> Host:
        """Make the host. Is called only after `find` has found none."""

    def find(self, order: Order) -> Host | None:
        """The host of this name that an earlier `create` has made, whether or not its answer arrived."""

    def delete(self, order: Order, host_id: str) -> None:
        """Give the host back, after which it costs nothing. One that is gone already is deleted."""


@dataclass(frozen=True)
class Target:
    """A server to be installed or verified, at `port` of its host's loopback. `files` are those at the centre with what is secret of it."""

    name: str
    hostname: str
    host: Host
    port: int
    files: Sequence[Path] = ()


class Player(Protocol):
    """Installs what a kind of server needs, and takes it off. Both may be repeated. Raises `ProvisioningError`."""

    def play(self, target: Target, say: Say) -> None: ...

    def remove(self, target: Target, say: Say) -> None: ...


Verify = Callable[[Target], Sequence[Finding]]


class DnsPublisher(Protocol):
    """What owns the records of servers (`dns.publishers`). All three raise `MailPipelinesError`."""

    def publish(self, records: Sequence[Record]) -> None:
        """Make them so: give all of a name's records of one type, since others of it go. What it has no power over it leaves out, and `missing` goes on
        naming it.
        """

    def withdraw(self, records: Sequence[Record]) -> None:
        """Remove them, where they still are as given."""

    def missing(self, records: Sequence[Record]) -> Sequence[Record]:
        """Those that resolvers do not see yet, or about which none answers."""


class Credentials(Protocol):
    """Accounts and keys of servers. Raises `MailPipelinesError`."""

    def give(self, name: str, kind: str) -> Sequence[Path]:
        """Make the accounts of a registered server, or give them new passwords; returns the files with what is secret."""

    def take(self, name: str) -> object:
        """End the server for good, with all that it has in hand. May be repeated."""

    def clear(self, name: str) -> None:
        """End its accounts elsewhere, at the broker and in the storage of runs, and its files at the centre. May be repeated."""


@dataclass(frozen=True)
class Parts:
    """All that makes and removes servers here; `players` and `verify` by the kind of the server."""

    engine: Engine
    settings: Settings
    sources: Sequence[HostSource]
    players: Mapping[str, Player]
    credentials: Credentials
    dns: DnsPublisher
    verify: Mapping[str, Verify]
    archive: Archive | None = None
    # Begins the warm-up of a server that has just become active, on the curve of a source whose addresses are cold.
    warm_up: Callable[[Connection, str, str], None] | None = None

    def source(self, name: str) -> HostSource:
        for source in self.sources:
            if source.name == name:
                return source
        raise ProvisioningError(
            f"no host source is called {name!r} any more, so its hosts cannot be deleted: put it back into {self.settings.provisioning.hosts}"
        )
