"""What a sending domain is: its names, its DKIM keys and where they are in their life, and what was last found of it in the DNS.

Plain values. What does not belong here: the database (`store`), private keys (`keys`), records (`records`), looking things up (`checking`).
"""

from __future__ import annotations

import datetime as dt
import enum
from dataclasses import dataclass

from mail_pipelines.contacts.addresses import normal_domain
from mail_pipelines.errors import MailPipelinesError

# A retired key stays published this long: mail signed with it may still wait in a queue (five days at most) or be looked at again.
RETIRED_DAYS = 14
ALL_SERVERS = 0


class DomainError(MailPipelinesError):
    """A sending domain that cannot be used as asked."""


class KeyState(enum.StrEnum):
    """waiting → active → retired: made and to be published; signing; no longer signing, published until mail signed with it has arrived."""

    WAITING = "waiting"
    ACTIVE = "active"
    RETIRED = "retired"


class Status(enum.StrEnum):
    """What a look at the DNS says about one record."""

    PUBLISHED = "published"
    MISSING = "missing"
    DIFFERENT = "different"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Names:
    """The three names of a sending domain, in A-labels."""

    domain: str
    return_path_domain: str
    tracking_domain: str

    @staticmethod
    def of(domain: str, return_path_domain: str | None = None, tracking_domain: str | None = None) -> Names:
        """The names in normal form, by default `bounces.` and `links.` below the domain. Raises `DomainError`."""
        given = {
            "From domain": domain,
            "return-path domain": return_path_domain or f"bounces.{domain}",
            "tracking domain": tracking_domain or f"links.{domain}",
        }
        normal = []
        for what, name in given.items():
            try:
                normal.append(normal_domain(name.strip().removesuffix(".")))
            except ValueError as error:
                raise DomainError(f"{what} {name!r} cannot be used: {error}") from error
        if len(set(normal)) < len(normal):
            raise DomainError(
                f"From, return-path and tracking domain must be three names, not {', '.join(normal)}: the MX of the return path would take the mail "
                "of the From domain, and a CNAME bears no other record beside it"
            )
        return Names(*normal)


@dataclass(frozen=True)
class DkimKey:
    """One key without its private half. `public_key` is the value of p= in its record; `server_id` 0 stands for all servers without a key of their own."""

    selector: str
    server_id: int
    state: KeyState
    public_key: str
    created_at: dt.datetime
    retired_at: dt.datetime | None

    @property
    def published_until(self) -> dt.datetime | None:
        """When the record of a retired key may be removed from the DNS; None for a key in use."""
        return self.retired_at and self.retired_at + dt.timedelta(days=RETIRED_DAYS)


@dataclass(frozen=True)
class Finding:
    """One record: what is expected in the DNS and what was found. Mail may not be sent while a `required` one is not published.

    `found` holds what the DNS has at this place, trimmed; `advice` says what to do, and is empty where there is nothing to do.
    """

    purpose: str
    name: str
    type: str
    expected: str
    found: tuple[str, ...]
    status: Status
    required: bool
    advice: str = ""

    def __str__(self) -> str:
        found = " | ".join(self.found) or "nothing"
        return f"{self.purpose}: {self.type} of {self.name}: expected {self.expected}, found {found}: {self.advice or self.status}"


@dataclass(frozen=True)
class Verdict:
    """What a look at the DNS found for one domain."""

    checked_at: dt.datetime
    findings: tuple[Finding, ...]

    @property
    def hindrances(self) -> list[Finding]:
        """Why no mail may be sent from the domain; empty if it may."""
        return [finding for finding in self.findings if finding.required and finding.status is not Status.PUBLISHED]


@dataclass(frozen=True)
class SendingDomain:
    """A registered domain with its keys, oldest first, and the last verdict, if it was ever looked up."""

    id: int
    names: Names
    keys: tuple[DkimKey, ...]
    verdict: Verdict | None
    created_at: dt.datetime

    def key(self, state: KeyState, server_id: int) -> DkimKey | None:
        """The waiting or active key of a server (or of `ALL_SERVERS`): there is one at most."""
        return next((key for key in self.keys if key.state is state and key.server_id == server_id), None)
