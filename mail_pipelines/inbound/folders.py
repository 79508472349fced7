"""Where received mail lies: one folder with a maildir for each kind of address, and what the receiving Exim needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mail_pipelines.config import InboundSettings

# What the receiving Exim files apart; `mailbox` is filled from an IMAP mailbox. All are read alike.
MAILDIRS = ("bounces", "complaints", "unsubscribes", "mailbox")


@dataclass(frozen=True)
class InboundFolders:
    root: Path

    @classmethod
    def of(cls, settings: InboundSettings) -> InboundFolders:
        return cls(Path(settings.folder))

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def spool(self) -> Path:
        return self.root / "spool"

    @property
    def mail(self) -> Path:
        return self.root / "mail"

    @property
    def verifier(self) -> Path:
        """The socket at which Exim asks."""
        return self.run / "verifier"

    @property
    def servers(self) -> Path:
        """The servers whose keys are accepted: all that the database has ever told."""
        return self.root / "servers.json"

    @property
    def lock(self) -> Path:
        """Held by the one process that reads the maildirs."""
        return self.root / "reading.lock"

    def maildirs(self) -> list[Path]:
        return [self.mail / name for name in MAILDIRS]
