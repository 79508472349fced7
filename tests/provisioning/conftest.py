"""A DNS server of the tests' own, and the fixtures of those that send."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mail_pipelines.config import DnsSettings
from mail_pipelines.provisioning import host_checks
from tests.dispatch.world import Servers
from tests.parts.dns import Zone, serving
from tests.provisioning.world import hosters, key_file, world

__all__ = ["dns", "hosters", "key_file", "running", "world", "zone"]


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mail server of these tests is silent for good."""
    monkeypatch.setattr(host_checks, "SECONDS", 120.0)


@pytest.fixture
def zone() -> Iterator[Zone]:
    with serving(Zone()) as zone:
        yield zone


@pytest.fixture
def dns(zone: Zone) -> DnsSettings:
    """So patient that only a name that is to get no answer gets none."""
    return DnsSettings(servers=[zone.address], timeout_seconds=60)


@pytest.fixture
def running() -> Iterator[Servers]:
    started = Servers()
    yield started
    started.stop()
