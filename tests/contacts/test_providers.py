"""The provider table: complete rows, and subdomains belong to their parent's provider."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mail_pipelines.contacts import providers
from mail_pipelines.contacts.addresses import normal_domain


def test_every_row_names_a_normal_domain_once_a_provider_and_a_source() -> None:
    with Path(providers.__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["domain"] for row in rows}) == len(rows)
    for row in rows:
        assert normal_domain(row["domain"]) == row["domain"]
        assert row["source"]
        assert row["provider"].isalnum()
        assert len(row["provider"]) <= 32


@pytest.mark.parametrize(
    ("domain", "provider"),
    [
        ("gmail.com", "google"),
        ("hotmail.co.uk", "microsoft"),
        ("yahoo.co.jp", "yahoojp"),
        ("web.de", "gmx"),
        ("google.test", "google"),
        ("eu.microsoft.test", "microsoft"),
        ("yahoo.test", "yahoo"),
        ("apple.test", "apple"),
        ("gmx.test", "gmx"),
        ("notgmail.com", "other"),
        ("example.test", "other"),
        ("com", "other"),
    ],
)
def test_provider_of(domain: str, provider: str) -> None:
    assert providers.provider_of(domain) == provider
    assert provider in providers.providers()
