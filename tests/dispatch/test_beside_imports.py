"""Claims beside an import. SQLite has one writer: short transactions leave claims their turn, far within their lease. MariaDB: no claim waits at all."""

from __future__ import annotations

import datetime as dt
import itertools
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event

from mail_pipelines.contacts.portions import PORTION_ROWS
from mail_pipelines.database.engine import create_engine, transact
from mail_pipelines.database.models import Contact, State
from mail_pipelines.delivery.recording import Result, record
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.claims import NothingClaimed, OpenClaim
from tests.dispatch.world import make_world

CONTACTS = 300_000


def _import(url: str, file: str) -> None:
    from mail_pipelines.contacts import importing

    importing.import_file(create_engine(url), Path(file), list_name="news", now=dt.datetime.now(dt.UTC))


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_claims_have_their_turn_while_contacts_are_imported(engine: sa.Engine, tmp_path: Path) -> None:
    """Failure scenario 23: the lease is at least three times the longest wait for the write lock."""
    world = make_world(engine, tmp_path / "home", recipients=4_000)
    server = world.server()
    world.grant(server)
    memory = servers.recall(engine, world.folders(server.key))
    file = tmp_path / "contacts.csv"
    with file.open("w") as out:
        out.write("email,first_name,city\n")
        out.writelines(f"reader{number}@place{number % 50}.test,Maria,Berlin\n" for number in range(CONTACTS))
    writer = multiprocessing.get_context("spawn").Process(target=_import, args=(engine.url.render_as_string(), str(file)))
    writer.start()
    waits = []
    providers = itertools.cycle(("google", "microsoft", "yahoo", "other"))
    while writer.is_alive():
        begin = time.monotonic()
        opened = world.claim(server, provider=next(providers), limit=5, memory=memory)
        waits.append(time.monotonic() - begin)
        if isinstance(opened, NothingClaimed):
            continue
        back = [Result(row.contact_id, row.attempt, State.PENDING) for row in opened.rows]
        begin = time.monotonic()
        transact(engine, lambda connection, opened=opened, back=back: record(connection, opened.ref, back, claim_state="open"))
        waits.append(time.monotonic() - begin)
    writer.join()
    assert writer.exitcode == 0
    with engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(Contact)).scalar_one() == 4_000 + CONTACTS
    assert len(waits) > 100
    assert max(waits) * 3 <= world.settings.sending.lease_seconds, f"waits of up to {max(waits):.1f} s"
    world.check_counters()


@pytest.mark.parametrize("database_url", [pytest.param("mariadb", marks=pytest.mark.server)], indirect=True)
def test_no_claim_waits_for_a_lock_of_an_import(engine: sa.Engine, tmp_path: Path) -> None:
    """Before each of its commits, rows are claimed and recorded, among them those of contacts that the import has just changed."""
    from mail_pipelines.contacts import importing

    world = make_world(engine, tmp_path / "home", recipients=400)
    server = world.server()
    world.grant(server)
    memory = servers.recall(engine, world.folders(server.key))
    file = tmp_path / "contacts.csv"
    with engine.connect() as connection:
        people = connection.execute(sa.select(Contact.email)).scalars().all()
    with file.open("w") as out:
        out.write("email,city\n")
        out.writelines(f"{email},Berlin\n" for email in people)
        out.writelines(f"reader{number}@place{number % 50}.test,Berlin\n" for number in range(3 * PORTION_ROWS))
    # Of the claims' connections: a lock that is not free at once is an error.
    engine.dispose()

    @event.listens_for(engine, "connect")
    def wait_for_nothing(connection: Any, _record: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET SESSION innodb_lock_wait_timeout = 0")

    importer = create_engine(engine.url.render_as_string(hide_password=False))
    opened: list[OpenClaim] = []

    @event.listens_for(importer, "commit")
    def claim_and_record(_connection: sa.Connection) -> None:
        taken = world.claim(server, limit=10, memory=memory)
        assert isinstance(taken, OpenClaim)
        if opened:
            back = [Result(row.contact_id, row.attempt, State.DELIVERED, 250, "2.0.0") for row in opened[-1].rows]
            transact(engine, lambda connection: record(connection, opened[-1].ref, back, claim_state="open"))
        opened.append(taken)

    report = importing.import_file(importer, file, list_name="news", now=dt.datetime.now(dt.UTC))
    importer.dispose()
    assert (report.inserted, report.updated) == (3 * PORTION_ROWS, 400)
    # The list and the fields, and a claim was open from then on.
    assert len(opened) == 1 + -(-report.read // PORTION_ROWS)
    world.check_counters()
