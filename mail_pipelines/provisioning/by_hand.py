"""The DNS as people publish it: the records of a server's own DKIM keys, which are waited for."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.engine import Engine

from mail_pipelines.config import Settings
from mail_pipelines.database.engine import reading
from mail_pipelines.domains import store
from mail_pipelines.domains.records import Record, dkim_record
from mail_pipelines.domains.resolver import Question, ask
from mail_pipelines.provisioning.interfaces import ServerRecords


@dataclass(frozen=True)
class ByHand:
    settings: Settings

    def publish(self, records: Sequence[Record]) -> None:
        """Nothing: it is a person's turn."""

    def withdraw(self, records: Sequence[Record]) -> None:
        """Nothing: it is a person's turn."""

    def missing(self, records: Sequence[Record]) -> list[Record]:
        if self.settings.sending.allow_unverified:
            return []
        answers = ask(self.settings.dns, list({Question(record.name, record.type) for record in records}))
        return [record for record in records if record.value not in answers[Question(record.name, record.type)].values]


@dataclass(frozen=True)
class Keys:
    """The records of its DKIM keys alone."""

    engine: Engine

    def __call__(self, server_id: int, hostname: str, addresses: Sequence[str], *, gone: bool) -> ServerRecords:
        now = dt.datetime.now(dt.UTC)
        with reading(self.engine) as connection:
            domains = store.all_domains(connection)
        own = [
            dkim_record(domain.names.domain, key)
            for domain in domains
            for key in domain.keys
            if key.server_id == server_id and (gone or key.published_until is None or key.published_until > now)
        ]
        return ServerRecords(own)
