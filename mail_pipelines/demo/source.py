"""The CRM beside the demo's platform: started, declared as a source, waited for, and at the end its own count held against ours.

What belongs here: what an operator does with such a source, who waits for its schedule. What does not: the CRM (`crm`, `crm_server`), and reading and telling
it, which is Dagster's work: the schedule `sync_crm` runs the job `sync_external` at each full minute.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import secrets
import sys
import urllib.request
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.config import Settings
from mail_pipelines.contacts import consent, lists
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Contact, SourceContact, Subscription, SyncOutbox
from mail_pipelines.demo import crm_server
from mail_pipelines.demo.crm import LIST
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.sources import declaration, outbox, status
from mail_pipelines.sources.declaration import Source
from mail_pipelines.sources.links import PRESENT
from mail_pipelines.supervision import Processes

NAME = "crm"
# Of the demo's contacts it alone brings one in so many.
ONE_IN = 20
_LIST_NAME = "CRM"
_DECLARATION = Path(__file__).with_name("crm.yaml")
_TOKEN = "DEMO_CRM_TOKEN_FILE"
# On a host that is busy; the reading begins at a full minute.
_START_SECONDS = 120
_READ_SECONDS = 600
_ANSWER_SECONDS = 60


@dataclass(frozen=True)
class CrmSource:
    """The running CRM at `address`, as it is `declared`."""

    engine: Engine
    processes: Processes
    declared: Source
    address: str
    token: str

    def wait_until_read(self) -> None:
        """Wait for the first run of its schedule, which comes at a full minute. Raises `MailPipelinesError` with the reason if it failed.

        From then on the CRM changes: whoever was deleted before it would be none of the contacts.
        """
        self.processes.wait_until_ready(lambda: self._in_step(dt.datetime.min.replace(tzinfo=dt.UTC)), seconds=_READ_SECONDS, what="the CRM's first reading")
        self._ask("changing", {"changing": True})

    def compare(self) -> dict[str, Any]:
        """What both sides count when the schedule has read and told all, about a minute later; nothing changes at the CRM meanwhile.

        `ours` and `theirs` have `people`, `subscribed`, `unsubscribed` and `events` by kind, and are equal if nothing was lost or counted twice.
        """
        self._ask("changing", {"changing": False})
        still_since = dt.datetime.now(dt.UTC)
        self.processes.wait_until_ready(lambda: self._in_step(still_since), seconds=_READ_SECONDS, what="the CRM's last reading")
        with reading(self.engine) as connection:
            ours = count(connection)
        counted = self._ask("counts")
        self._ask("changing", {"changing": True})
        return {"address": self.address, "ours": ours, "theirs": {name: counted[name] for name in ours}, "changes": counted["changes"]}

    def _in_step(self, since: dt.datetime) -> bool:
        """Whether all parts were read and told in a run that began after `since`."""
        for part in self.declared.parts:
            standing = status.read(self.engine, NAME, part)
            if standing.error:
                raise MailPipelinesError(f"the CRM's {part} are not in step: {standing.error}")
            if standing.good_at is None or dt.datetime.fromisoformat(standing.good_at) < since:
                return False
        return True

    def _ask(self, what: str, told: Mapping[str, object] | None = None) -> Any:
        """GET, or PUT if something is told."""
        body = None if told is None else json.dumps(told).encode()
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}/v1/{what}", body, headers, method="GET" if body is None else "PUT")
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as reply:
            return json.load(reply)


def people_of(contacts: int) -> int:
    """How many of the demo's contacts are known to the CRM alone when it starts."""
    return contacts // ONE_IN


def start(engine: Engine, settings: Settings, processes: Processes, contacts: int) -> CrmSource:
    """Start the CRM and declare it. Call it before Dagster is started, whose code location reads the declaration, and whose runs need the token."""
    token_file, address_file = settings.home / "secrets" / "crm_token", Path(settings.server.run_folder) / "crm"
    token_file.touch(mode=0o600)
    token_file.write_text(secrets.token_urlsafe(24), encoding="utf-8")
    os.environ[_TOKEN] = str(token_file)
    known = people_of(contacts)
    people = ["--people", str(known), "--strangers", str(contacts - known)]
    processes.start("crm", [sys.executable, "-m", crm_server.__name__, str(token_file), str(address_file), *people], log=settings.home / "log" / "crm.log")
    processes.wait_until_ready(address_file.exists, seconds=_START_SECONDS, what="the CRM")
    address = address_file.read_text(encoding="utf-8")
    declare(settings.home, address)
    # The segment of its people speaks of the list, which the first reading would make later.
    transact(engine, lambda connection: lists.ensure(connection, _LIST_NAME, now=dt.datetime.now(dt.UTC)))
    return CrmSource(engine, processes, declaration.load(settings.home, NAME), address, token_file.read_text(encoding="utf-8"))


def declare(home: Path, address: str) -> None:
    """Write the declaration of the CRM at an address."""
    folder = home / declaration.FOLDER
    folder.mkdir()
    (folder / f"{NAME}.yaml").write_text(_DECLARATION.read_text(encoding="utf-8").replace("http://127.0.0.1:PORT", address), encoding="utf-8")


def count(connection: Connection) -> dict[str, Any]:
    """Whom the CRM knows, by our tables, and what it was told by kind.

    Subscribed is who may be mailed in the name of its list, as far as the CRM can know: it is not told of whole domains that are suppressed.
    """
    target = lists.get(connection, LIST)
    known = sa.select(Contact.id).where(Contact.id.in_(sa.select(SourceContact.contact_id).where(SourceContact.source == NAME, SourceContact.state == PRESENT)))
    suppressed = consent.suppressed_clause(Contact.address_hash, sa.literal(""), consent.campaign_scopes(target.brand_id, target.id))
    subscribed = known.join(Subscription, Subscription.contact_id == Contact.id).where(
        Subscription.list_id == target.id, Subscription.subscribed, sa.not_(suppressed)
    )
    people, mailed = (connection.execute(sa.select(sa.func.count()).select_from(query.subquery())).scalar_one() for query in (known, subscribed))
    told = connection.execute(sa.select(SyncOutbox.kind, SyncOutbox.facts).where(SyncOutbox.source == NAME, SyncOutbox.state == outbox.TOLD))
    # What the CRM said itself is in the outbox as told, without facts.
    events = Counter(kind for kind, facts in told.tuples() if facts)
    return {"people": people, "subscribed": mailed, "unsubscribed": people - mailed, "events": dict(sorted(events.items()))}
