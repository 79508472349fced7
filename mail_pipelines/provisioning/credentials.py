"""Accounts and keys of a server on a host of its own, and the files in which the centre keeps them until they are on that host.

What belongs here: which there are, where, and their end. What does not: what an account may do (`database.boundary`; of Dagster's
storage and the results `resources.server_storage`), and how the broker is asked (`resources.broker_accounts`); these two are passed in.
"""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sqlalchemy.engine import Engine

from mail_pipelines.config import Settings
from mail_pipelines.dispatch import accounts
from mail_pipelines.dispatch.accounts import Account, Revoked
from mail_pipelines.dispatch.files import replace_file


class Storage(Protocol):
    """Dagster's storage and the results of runs, as accounts of the central database use them. Raises `MailPipelinesError`."""

    def prepare(self) -> None:
        """Let the accounts of all servers use them. May be repeated."""

    def environment(self, account: Account) -> Mapping[str, str]:
        """What to set for that on the account's host."""


class BrokerAccounts(Protocol):
    """Accounts at the broker by the server's name. All raise `MailPipelinesError`, and may be repeated."""

    def check(self) -> None:
        """Whether accounts could be made now."""

    def put(self, account: str, password: str) -> None:
        """Make it, or give it another password."""

    def delete(self, account: str) -> None: ...


@dataclass(frozen=True)
class Kept:
    """The files of one server. `environment` are lines of its host's environment file. `url` is written last, by which others see that the rest is there."""

    password: Path
    environment: Path
    token_key: Path
    broker: Path
    url: Path

    @classmethod
    def of(cls, settings: Settings, name: str) -> Kept:
        return cls(**{ending: folder(settings) / f"{name}.{ending}" for ending in cls.__dataclass_fields__})

    def remove(self) -> None:
        for path in vars(self).values():
            path.unlink(missing_ok=True)


def folder(settings: Settings) -> Path:
    """Where the centre keeps what servers have that is secret."""
    return settings.home / "secrets" / "servers"


@dataclass(frozen=True)
class Accounts:
    """Accounts of one centre's servers. Without a `broker` there are none at one."""

    engine: Engine
    settings: Settings
    storage: Storage
    broker: BrokerAccounts | None = None

    def give_accounts(self, name: str) -> Account:
        """The account of all databases and that at the broker, or new passwords for them. What is missing for one of them is found before any is changed."""
        kept = Kept.of(self.settings, name)
        kept.password.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.broker is not None:
            self.broker.check()
        given = accounts.give(self.engine, name, self.storage.prepare)
        replace_file(kept.password, given.password + "\n")
        if lines := self.storage.environment(given):
            replace_file(kept.environment, "".join(f"{variable}='{value}'\n" for variable, value in lines.items()))
        if self.broker is not None:
            password = secrets.token_urlsafe(32)
            self.broker.put(name, password)
            replace_file(kept.broker, password + "\n")
        return given

    def give_key(self, given: Account) -> None:
        """The token key, and with it all that the account needs. Raises `accounts.KeyHeld` for a server that cannot get its own one now."""
        kept = Kept.of(self.settings, given.server)
        replace_file(kept.token_key, accounts.token_key_of(self.engine, given.server, self.settings.token_key()).decode("ascii") + "\n")
        replace_file(kept.url, given.url + "\n")

    def give(self, name: str, kind: str) -> Sequence[Path]:
        if kind == "catcher":
            # A process of the centre's own, with the centre's own.
            return ()
        self.give_key(self.give_accounts(name))
        kept = Kept.of(self.settings, name)
        # The URL is no secret; the password, which is in the addresses of `environment` too, is.
        return [kept.password, kept.token_key, kept.broker, kept.environment]

    def take(self, name: str) -> Revoked:
        return accounts.revoke(self.engine, name, dt.datetime.now(dt.UTC))

    def clear(self, name: str) -> None:
        if self.broker is not None:
            self.broker.delete(name)
        Kept.of(self.settings, name).remove()
