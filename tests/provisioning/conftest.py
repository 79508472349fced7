"""Fixtures of all tests of provisioning: a world of hosters (`tests.provisioning.world`)."""

from __future__ import annotations

from tests.provisioning.world import hosters, key_file, world

__all__ = ["hosters", "key_file", "world"]
