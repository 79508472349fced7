"""The chapters of docs/runbook.md, for whatever tells an operator of something that one of them is about. A test holds both against each other."""

from __future__ import annotations

import enum


class Chapter(enum.StrEnum):
    """By its heading; `place` is what is told."""

    BLOCKED = "Blocked by a provider"
    LISTED = "Listed address"
    WRONG_CAMPAIGN = "Wrong campaign out"
    RESTORED = "Database restored"
    STOLEN = "Server stolen"
    DISK_FULL = "Disk full"
    DAEMON_DEAD = "Daemon dead"

    @property
    def place(self) -> str:
        return f"docs/runbook.md#{self.value.lower().replace(' ', '-')}"
