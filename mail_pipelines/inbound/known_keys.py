"""The keys under which the receiving host takes a token for ours: those of the servers that it knows, while the database is away too.

What belongs here: when to ask the database once more, and remembering its answer. What does not: what a key is (`messages.keyring`), and who
asks (`verifier`).
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
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
    """The installation's token key and the keys of its servers. `look_up` gives the servers (id → name) or raises `LookUpFailed`; `memory` keeps the answer."""

    def __init__(self, token_key: bytes, look_up: Callable[[], Mapping[int, str]], memory: Path) -> None:
        self._token_key = token_key
        self._look_up = look_up
        self._memory = memory
        self._lock = threading.Lock()
        self._looked_at = float("-inf")
        self._failed = False
        self._ring = KeyRing.of(token_key, self._remembered())

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
            servers = self._look_up()
        except LookUpFailed:
            self._failed = True
        else:
            self._failed = False
            if servers != self._remembered():
                # Without room for it, mail is taken all the same.
                with contextlib.suppress(DispatchError):
                    replace_file(self._memory, json.dumps(servers))
            self._ring = KeyRing.of(self._token_key, servers)
        # After the answer, which may have taken long.
        self._looked_at = time.monotonic()

    def _remembered(self) -> Mapping[int, str]:
        try:
            return {int(number): str(name) for number, name in json.loads(self._memory.read_text(encoding="utf-8")).items()}
        except (FileNotFoundError, ValueError, AttributeError):
            # Never kept, or torn by a power loss.
            return {}
