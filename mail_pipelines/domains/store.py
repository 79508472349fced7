"""Sending domains and their keys in the central database.

What belongs here: reading and writing rows. What does not: when a key changes (`rotation`), which one signs (`signing`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database import models
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.dispatch import token_keys
from mail_pipelines.domains import keys
from mail_pipelines.domains.domain import ALL_SERVERS, DkimKey, DomainError, Finding, KeyState, Names, SendingDomain, Status, Verdict
from mail_pipelines.errors import nearest


def add(engine: Engine, names: Names, secret: bytes, now: dt.datetime) -> SendingDomain:
    """Register a domain with its first keys, which sign from now on: one for all servers, and one for each that has an account, and so one host, of its own.

    Raises `DomainError` if it is there already.
    """
    with reading(engine) as connection:
        owners: list[tuple[int, str | None]] = [(ALL_SERVERS, None), *((server.id, server.key) for server in token_keys.remote(connection))]
    made: dict[str, tuple[int, str, bytes]] = {}
    for server_id, server in owners:
        private, selector = keys.generate(), new_selector(tuple(made), now)
        made[selector] = server_id, keys.public_text(private), keys.seal_own(private, secret, server, names.domain, selector)

    def work(connection: Connection) -> SendingDomain:
        if find(connection, names.domain) is not None:
            raise DomainError(f"sending domain {names.domain} is there already: `mail-pipelines domain show {names.domain}` prints its records")
        connection.execute(sa.insert(models.SendingDomain).values(**asdict(names), ready=False, created_at=now))
        domain_id = connection.execute(sa.select(models.SendingDomain.id).where(models.SendingDomain.domain == names.domain)).scalar_one()
        for selector, (server_id, public_key, sealed) in made.items():
            insert_key(connection, domain_id, selector, server_id, KeyState.ACTIVE, public_key, sealed, now)
        return load(connection, names.domain)

    return transact(engine, work)


def insert_key(
    connection: Connection, domain_id: int, selector: str, server_id: int, state: KeyState, public_key: str, sealed: bytes, now: dt.datetime
) -> None:
    row = {"domain_id": domain_id, "selector": selector, "server_id": server_id, "state": state.value, "public_key": public_key}
    connection.execute(sa.insert(models.DkimKey).values(**row, private_key=sealed, created_at=now))


def new_selector(taken: tuple[str, ...], now: dt.datetime) -> str:
    """A selector by the day, so that who reads the zone sees a key's age; the second key of a day has a number."""
    day = f"mp{now:%Y%m%d}"
    return next(name for name in (day, *(f"{day}-{number}" for number in range(2, len(taken) + 2))) if name not in taken)


def reseal_keys_of(connection: Connection, server_id: int, server: str, token_key: bytes) -> None:
    """Seal the keys of a server for the token key that is derived for it; those that are so already, too. Raises `KeyNotOpened`."""
    table, domain = models.DkimKey, models.SendingDomain
    query = sa.select(table.id, table.selector, table.private_key, domain.domain).join(domain, domain.id == table.domain_id)
    for row in connection.execute(query.where(table.server_id == server_id, table.private_key.is_not(None))).all():
        private = keys.unseal_own(row.private_key, token_key, server, row.domain, row.selector)
        sealed = keys.seal_own(private, token_key, server, row.domain, row.selector)
        connection.execute(sa.update(table).where(table.id == row.id).values(private_key=sealed))


def without_key(connection: Connection, servers: Collection[int]) -> dict[int, list[str]]:
    """Of these servers those that have no key of their own to sign mail with, each with the domains of which they lack it."""
    table, domain = models.DkimKey, models.SendingDomain
    names = dict(connection.execute(sa.select(domain.id, domain.domain).order_by(domain.domain)).tuples().all())
    active = sa.select(table.server_id, table.domain_id).where(table.server_id.in_(servers), table.state == KeyState.ACTIVE.value)
    present = set(connection.execute(active).tuples())
    lacking = {number: [name for domain_id, name in names.items() if (number, domain_id) not in present] for number in sorted(servers)}
    return {number: domains for number, domains in lacking.items() if domains}


def retire_keys_of(connection: Connection, server_id: int, now: dt.datetime) -> tuple[str, ...]:
    """Retire the keys that only this server signs with, and destroy their private halves; returns the names of their DNS records.

    Unlike after a rotation the records have to go at once: whoever has the server may have copied the keys.
    """
    table, domain = models.DkimKey, models.SendingDomain
    own = (table.server_id == server_id, table.server_id != ALL_SERVERS)
    rows = connection.execute(sa.select(table.selector, domain.domain).join(domain, domain.id == table.domain_id).where(*own)).all()
    retired = {"state": KeyState.RETIRED.value, "private_key": None, "retired_at": sa.func.coalesce(table.retired_at, now)}
    connection.execute(sa.update(table).where(*own).values(**retired))
    return tuple(f"{row.selector}._domainkey.{row.domain}" for row in rows)


def load(connection: Connection, domain: str, *, for_update: bool = False) -> SendingDomain:
    """The domain of this name, its row locked if `for_update`. Raises `DomainError` if there is none, naming the nearest."""
    name = Names.of(domain).domain
    if for_update:
        connection.execute(sa.select(models.SendingDomain.id).where(models.SendingDomain.domain == name).with_for_update()).all()
    found = find(connection, name)
    if found is None:
        known = connection.execute(sa.select(models.SendingDomain.domain)).scalars()
        raise DomainError(f"{name} is no sending domain; {nearest(name, known)}; `mail-pipelines domain add {name}` makes it one")
    return found


def find(connection: Connection, domain: str) -> SendingDomain | None:
    """The domain of this name (in A-labels), if it is registered."""
    return next(iter(_select(connection, models.SendingDomain.domain == domain)), None)


def all_domains(connection: Connection) -> list[SendingDomain]:
    """All domains by name."""
    return _select(connection, sa.true())


def sending_hosts(connection: Connection) -> tuple[str, ...]:
    """Names or addresses of the servers that mail leaves from, sorted."""
    query = sa.select(models.Server.host).where(models.Server.state.not_in(("retired", "lost"))).distinct()
    return tuple(sorted(connection.execute(query).scalars()))


def keep(connection: Connection, domain_id: int, verdict: Verdict) -> None:
    """Remember a verdict as the domain's last one."""
    findings = [asdict(finding) for finding in verdict.findings]
    values = {"ready": not verdict.hindrances, "findings": findings, "checked_at": verdict.checked_at}
    connection.execute(sa.update(models.SendingDomain).where(models.SendingDomain.id == domain_id).values(**values))


def _select(connection: Connection, where: sa.ColumnElement[bool]) -> list[SendingDomain]:
    rows = connection.execute(sa.select(models.SendingDomain.__table__).where(where).order_by(models.SendingDomain.domain)).all()
    # Without the private keys: who lists domains has no use for them.
    columns = [column for column in models.DkimKey.__table__.columns if column.name != "private_key"]
    chosen = sa.select(*columns).where(models.DkimKey.domain_id.in_([row.id for row in rows])).order_by(models.DkimKey.id)
    by_domain: dict[int, list[DkimKey]] = {row.id: [] for row in rows}
    for row in connection.execute(chosen):
        key = DkimKey(row.selector, row.server_id, KeyState(row.state), row.public_key, row.created_at, row.retired_at)
        by_domain[row.domain_id].append(key)
    return [_domain(row, tuple(by_domain[row.id])) for row in rows]


def _domain(row: sa.Row[Any], its_keys: tuple[DkimKey, ...]) -> SendingDomain:
    names = Names(row.domain, row.return_path_domain, row.tracking_domain)
    verdict = None if row.checked_at is None else Verdict(row.checked_at, tuple(map(_finding, row.findings)))
    return SendingDomain(row.id, names, its_keys, verdict, row.created_at)


def _finding(document: dict[str, Any]) -> Finding:
    return Finding(**document | {"found": tuple(document["found"]), "status": Status(document["status"])})
