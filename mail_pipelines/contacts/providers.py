"""Which mailbox provider takes the mail of a domain: by the table `providers.csv`, domain or nearest parent domain.

A provider is the unit of limits and plans. What a provider permits is not here (`provider_limits` holds it).
"""

from __future__ import annotations

import csv
import functools
from importlib import resources

OTHER = "other"


@functools.cache
def _table() -> dict[str, str]:
    with resources.files(__package__).joinpath("providers.csv").open(encoding="utf-8") as file:
        return {row["domain"]: row["provider"] for row in csv.DictReader(file)}


def providers() -> list[str]:
    """All provider groups, `other` last."""
    return [*sorted(set(_table().values())), OTHER]


@functools.lru_cache(maxsize=65_536)
def provider_of(domain: str) -> str:
    """The provider group of a domain in A-labels, or `other`."""
    table = _table()
    name = domain
    while name:
        if provider := table.get(name):
            return provider
        name = name.partition(".")[2]
    return OTHER
