"""SQLite has one writer: an import in short transactions leaves claims their turn, far within their lease."""

from __future__ import annotations

import datetime as dt
import itertools
import multiprocessing
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import create_engine, transact
from mail_pipelines.database.models import Contact, State
from mail_pipelines.delivery.recording import Result, record
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.claims import NothingClaimed
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
