"""The words of a claim: who asks for what, and what the answer is made of. Nothing here asks a database."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any

from mail_pipelines.contacts.addresses import normal_domain
from mail_pipelines.delivery.recording import ClaimRef
from mail_pipelines.dispatch.files import DispatchError
from mail_pipelines.dispatch.journal import Position


class WrongServer(DispatchError):
    """This process may not speak for the server: other incarnation, or a database of another time."""


@dataclass(frozen=True)
class Sender:
    """Who claims: a session on a server."""

    server_id: int
    server_key: str
    incarnation: str
    boot_id: str
    run_id: str


@dataclass(frozen=True)
class Memory:
    """What a server remembers of the database: its generation, the newest claim opened in it, and the server's last heartbeat there.

    A database that does not know one of them is an older one: the claim would give out rows that this server, or another, has mailed since.
    """

    generation: str
    newest_claim: int | None = None
    last_beat: dt.datetime | None = None


@dataclass(frozen=True)
class Request:
    """Up to `limit` rows of a shard and provider, for `lease_seconds`; `position` is the place in the journal after the claim's marker."""

    sender: Sender
    memory: Memory
    claim_id: int
    campaign_id: int
    shard: int
    provider: str
    limit: int
    position: Position
    lease_seconds: float


@dataclass(frozen=True)
class Row:
    """One recipient of a claim, with address and merge fields as they are now. `asks`: the first of its domain after a silence, while others wait."""

    contact_id: int
    attempt: int
    email: str
    values: dict[str, Any]
    asks: bool = False

    @property
    def domain(self) -> str:
        """As in `contacts.domain`."""
        domain = self.email.rpartition("@")[2]
        try:
            return normal_domain(domain)
        except ValueError:
            return domain


@dataclass(frozen=True)
class Taken:
    """What the database gave at `now`: the claim is written, `rows` are its own."""

    now: dt.datetime
    version_id: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class OpenClaim:
    """A claim that was opened; `rows` may be sent until `lease_until` (database time)."""

    ref: ClaimRef
    rows: tuple[Row, ...]
    version_id: int
    lease_until: dt.datetime
    position: Position
    # The same moment on this process's monotonic clock, taken before the database was asked.
    opened: float

    def database_second(self, monotonic: float) -> float:
        """The database's clock (epoch seconds) at a moment of this process's monotonic one, to within the time that the claim took."""
        return self.ref.opened_at.timestamp() + monotonic - self.opened


@dataclass(frozen=True)
class NothingClaimed:
    """No row may be sent now, and why. `retry_seconds`: how long from now until that may change, if it is known.

    `ends_session` tells a reason that concerns the whole campaign from one that concerns one provider, `only_here` one that concerns one shard.
    """

    reason: str
    retry_seconds: float | None = None
    ends_session: bool = False
    only_here: bool = False
