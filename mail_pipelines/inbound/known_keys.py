"""The keys under which the receiving host takes a token for ours: those of the servers that it knows, while the database is away too.

What belongs here: when to ask the database once more, and remembering its answers. What does not: what a key is (`messages.keyring`), and who
asks (`verifier`). No server is ever forgotten: a database that was restored may not know it yet, and its mail is ours all the same.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from mail_pipelines.dispatch.files import DispatchError, replace_file
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.messages.keyring import KeyRing
from mail_pipelines.messages.tokens import TokenError

# Forged tokens come in thousands, and ask the database no more often than this. A server mails nothing in so short a time after it was registered.
LOOK_UP_SECONDS = 5.0
# So long a question waits for the look-up of another one.
_WAIT_SECONDS = 1.0


class LookUpFailed(MailPipelinesError):
    """Which servers there are could not be asked now."""


class KnownKeys:
    """The installation's token key and the keys of its servers. `look_up` gives their names or raises `LookUpFailed`; `memory` keeps all that it ever gave."""

    def __init__(self, token_key: bytes, look_up: Callable[[], Iterable[str]], memory: Path) -> None:
        self._token_key = token_key
        self._look_up = look_up
        self._memory = memory
        self._lock = threading.Lock()
        self._looked_at = float("-inf")
        self._failed = False
        self._servers = self._remembered()
        self._ring = self._ring_of(self._servers)

    def is_ours(self, token: str) -> bool | None:
        """Whether a delivery token is under one of the keys; None if it is under none that is known, and nobody can be asked for new ones."""
        return True if self._opens(token) else self._opens_after_a_look(token)

    def _opens(self, token: str) -> bool:
        try:
            self._ring.read_delivery(token)
        except TokenError:
            return False
        return True

    def _opens_after_a_look(self, token: str) -> bool | None:
        if not self._lock.acquire(timeout=_WAIT_SECONDS):
            return None
        try:
            if time.monotonic() - self._looked_at >= LOOK_UP_SECONDS:
                self._renew()
            failed = self._failed
        finally:
            self._lock.release()
        return self._opens(token) or (None if failed else False)

    def _renew(self) -> None:
        try:
            told = self._look_up()
        except LookUpFailed:
            self._failed = True
        else:
            self._failed = False
            self._servers = self._servers.union(told)
            if self._servers != self._remembered():
                # Without room for it, mail is taken all the same.
                with contextlib.suppress(DispatchError):
                    replace_file(self._memory, json.dumps(sorted(self._servers)))
            self._ring = self._ring_of(self._servers)
        # After the answer, which may have taken long.
        self._looked_at = time.monotonic()

    def _ring_of(self, servers: Iterable[str]) -> KeyRing:
        # Whose a token is matters to those who read the mail, and they ask the database.
        return KeyRing.of(self._token_key, dict(enumerate(servers, 1)))

    def _remembered(self) -> frozenset[str]:
        try:
            return frozenset(json.loads(self._memory.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):
            # Never kept, or torn by a power loss.
            return frozenset()
