"""Accounts and keys of a server that is made here, and the files in which the centre keeps them until they are on its host.

What belongs here: which there are, where, and their end. What does not: what an account may do (`database.boundary` for the central database), and
RabbitMQ's tool (passed in).
"""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sqlalchemy.engine import Engine

from mail_pipelines.config import Settings
from mail_pipelines.dispatch import accounts
from mail_pipelines.dispatch.files import replace_file


class OtherAccounts(Protocol):
    """Accounts by a server's name somewhere else. Both raise `MailPipelinesError`, and may be repeated."""

    def put(self, account: str, password: str) -> None:
        """Make it, or give it another password."""

    def delete(self, account: str) -> None: ...


# What is in the folder of each server: NAME. and one of these.
_OWN = ("url", "password", "token_key")


def folder(settings: Settings) -> Path:
    """Where the centre keeps what servers have that is secret."""
    return settings.home / "secrets" / "servers"


@dataclass(frozen=True)
class Accounts:
    """`others`: the accounts that a server has elsewhere, by the ending of the file with the password: broker, storage."""

    engine: Engine
    settings: Settings
    others: Sequence[tuple[str, OtherAccounts]] = ()

    def give(self, name: str, kind: str) -> Sequence[Path]:
        if kind == "catcher":
            # A process of the centre's own, with the centre's own.
            return ()
        given = accounts.give(self.engine, name)
        token_key = accounts.token_key_of(self.engine, name, self.settings.token_key()).decode("ascii")
        written = [self._write(name, ending, value) for ending, value in zip(_OWN, (given.url, given.password, token_key), strict=True)]
        for ending, other in self.others:
            password = secrets.token_urlsafe(32)
            written.append(self._write(name, ending, password))
            other.put(name, password)
        # The URL is none.
        return written[1:]

    def take(self, name: str) -> None:
        accounts.revoke(self.engine, name, dt.datetime.now(dt.UTC))

    def clear(self, name: str) -> None:
        for _, other in self.others:
            other.delete(name)
        for ending in (*_OWN, *(ending for ending, _ in self.others)):
            (folder(self.settings) / f"{name}.{ending}").unlink(missing_ok=True)

    def _write(self, name: str, ending: str, value: str) -> Path:
        path = folder(self.settings) / f"{name}.{ending}"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, value + "\n")
        return path
