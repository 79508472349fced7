"""Changing the DKIM key of a domain without a message that cannot be verified: publish the new one, then sign with it, later unpublish the old one.

What belongs here: the steps between the states of a key. What does not: the rows (`store`).
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, replace

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.config import Settings
from mail_pipelines.database import models
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.domains import checking, keys, store
from mail_pipelines.domains.domain import ALL_SERVERS, DkimKey, DomainError, KeyState, SendingDomain, Status


class NotPublished(DomainError):
    """The new key's record is not in the DNS yet, so nothing may be signed with it."""


@dataclass(frozen=True)
class Step:
    """What `rotate` did: made `key`, which waits to be published, or made it the active one instead of `retired` (if there was one)."""

    domain: str
    key: DkimKey
    retired: DkimKey | None


def rotate(engine: Engine, settings: Settings, domain: str, now: dt.datetime, *, server_id: int = ALL_SERVERS, allow_unverified: bool = False) -> Step:
    """The next step for the key of all servers, or of one server.

    Without a waiting key one is made. With one the DNS is asked, and if it has the record the key takes over; the old one's private
    half is destroyed. Raises `NotPublished` if it has not, unless `allow_unverified`.
    """
    with reading(engine) as connection:
        registered = store.load(connection, domain)
    waiting = registered.key(KeyState.WAITING, server_id)
    if waiting is None:
        return Step(registered.names.domain, _make(engine, registered, settings.token_key(), server_id, now), None)
    if not allow_unverified:
        finding = checking.check_key(settings, registered.names.domain, waiting)
        if finding.status is not Status.PUBLISHED:
            raise NotPublished(f"the key {waiting.selector} is not taken into use: {finding}")
    return transact(engine, lambda connection: _switch(connection, registered, waiting, now))


def equip(engine: Engine, settings: Settings, server_id: int, now: dt.datetime, *, allow_unverified: bool = False) -> list[Step]:
    """The steps towards a key of a server's own for every domain: keys are made where it has none, and taken into use once they are published.

    A step whose key waits has its record still to be published. When nothing is left to do there are none.
    """
    with reading(engine) as connection:
        domains = store.all_domains(connection)
    steps = []
    for domain in domains:
        waiting = domain.key(KeyState.WAITING, server_id)
        if waiting is None and domain.key(KeyState.ACTIVE, server_id) is not None:
            continue
        try:
            steps.append(rotate(engine, settings, domain.names.domain, now, server_id=server_id, allow_unverified=allow_unverified))
        except NotPublished:
            assert waiting is not None
            steps.append(Step(domain.names.domain, waiting, None))
    return steps


def _make(engine: Engine, domain: SendingDomain, secret: bytes, server_id: int, now: dt.datetime) -> DkimKey:
    private = keys.generate()

    def work(connection: Connection) -> DkimKey:
        present = store.load(connection, domain.names.domain, for_update=True)
        if made := present.key(KeyState.WAITING, server_id):
            return made
        selector = store.new_selector(tuple(key.selector for key in present.keys), now)
        server = connection.execute(sa.select(models.Server.key).where(models.Server.id == server_id)).scalar_one_or_none()
        sealed = keys.seal_own(private, secret, server, domain.names.domain, selector)
        store.insert_key(connection, domain.id, selector, server_id, KeyState.WAITING, keys.public_text(private), sealed, now)
        made = store.load(connection, domain.names.domain).key(KeyState.WAITING, server_id)
        assert made is not None
        return made

    return transact(engine, work)


def _switch(connection: Connection, domain: SendingDomain, waiting: DkimKey, now: dt.datetime) -> Step:
    present = store.load(connection, domain.names.domain, for_update=True)
    if present.key(KeyState.WAITING, waiting.server_id) != waiting:
        raise DomainError(f"the keys of {domain.names.domain} were changed meanwhile; see `mail-pipelines domain show {domain.names.domain}`")
    retired = present.key(KeyState.ACTIVE, waiting.server_id)
    if retired is not None:
        _move(connection, domain.id, retired, state=KeyState.RETIRED.value, retired_at=now, private_key=None)
    _move(connection, domain.id, waiting, state=KeyState.ACTIVE.value)
    return Step(domain.names.domain, replace(waiting, state=KeyState.ACTIVE), retired)


def _move(connection: Connection, domain_id: int, key: DkimKey, **values: object) -> None:
    connection.execute(sa.update(models.DkimKey).where(models.DkimKey.domain_id == domain_id, models.DkimKey.selector == key.selector).values(**values))
