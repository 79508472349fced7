"""A DNS server of the tests' own, and settings that ask it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.domains import records, store
from mail_pipelines.domains.domain import Names, SendingDomain
from tests.parts.dns import Zone, serving

NOW = dt.datetime(2026, 3, 2, 9, 0, tzinfo=dt.UTC)
HOSTS = records.Hosts("mail.example.test", "mail.example.test", ())


@pytest.fixture
def zone() -> Iterator[Zone]:
    with serving(Zone()) as zone:
        yield zone


@pytest.fixture
def settings(zone: Zone, database_url: str, monkeypatch: pytest.MonkeyPatch) -> config.Settings:
    """As in an installation, where the DNS decides: nothing is allowed unverified."""
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", database_url)
    monkeypatch.setenv("MAIL_PIPELINES_SENDING__TOKEN_KEY", "a key for tests")
    monkeypatch.setenv("MAIL_PIPELINES_DNS__SERVERS", zone.address)
    # What answers does so at once, but for a machine that stands still.
    monkeypatch.setenv("MAIL_PIPELINES_DNS__TIMEOUT_SECONDS", "60")
    monkeypatch.delenv("MAIL_PIPELINES_SENDING__ALLOW_UNVERIFIED")
    return config.load()


def impatient(settings: config.Settings) -> config.Settings:
    """For questions that get no answer: they are waited for to the end."""
    return settings.model_copy(update={"dns": settings.dns.model_copy(update={"timeout_seconds": 1.0})})


@pytest.fixture
def domain(engine: sa.Engine, settings: config.Settings) -> SendingDomain:
    return store.add(engine, Names.of("shop.example"), settings.token_key(), NOW)


def publish(zone: Zone, domain: SendingDomain, now: dt.datetime = NOW) -> None:
    """Paste all its records into the zone."""
    zone.publish(*(record.zone_line() for record in records.records_of(domain, HOSTS, now)))
