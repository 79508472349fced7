"""Why the demo's two counts are equal: whoever comes, changes, leaves or is deleted at the CRM, or leaves here, is the same on both sides when all is told."""

from __future__ import annotations

import datetime as dt
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.contacts import consent
from mail_pipelines.contacts.importing import import_file
from mail_pipelines.database.engine import create_engine, reading, transact
from mail_pipelines.database.models import Campaign, Contact, SourceContact
from mail_pipelines.demo import data, source
from mail_pipelines.demo.crm import Crm
from mail_pipelines.demo.crm_server import make_server
from mail_pipelines.demo.people import SEED, make_person
from mail_pipelines.sources import declaration, running, telling

IMPORTED, OWN = 1_000, 200


@pytest.fixture
def engine(tmp_path: Path, _sqlite_template: Path) -> Iterator[sa.Engine]:
    """As in the demo; what differs on MariaDB is tested with sources."""
    shutil.copy(_sqlite_template, tmp_path / "central.sqlite3")
    engine = create_engine(f"sqlite:///{tmp_path / 'central.sqlite3'}")
    yield engine
    engine.dispose()


@pytest.fixture
def crm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crm]:
    """A CRM to which the people of the files come, declared in the home `tmp_path`."""
    draws = random.Random(1), random.Random(SEED)
    crm = Crm([make_person(draws[0], IMPORTED + number) for number in range(OWN)], (make_person(draws[1], number) for number in range(IMPORTED)))
    server = make_server(crm, "token")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setenv("DEMO_CRM_TOKEN", "token")
    source.declare(tmp_path, f"http://127.0.0.1:{server.server_port}")
    try:
        yield crm
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
def test_both_count_the_same_whatever_happened_on_either_side(engine: sa.Engine, crm: Crm, tmp_path: Path) -> None:
    declared = declaration.load(tmp_path, source.NAME)

    def sync() -> None:
        for section in declared.sections:
            running.run(engine, tmp_path, declared, section)
        telling.run(engine, tmp_path, declared)

    def now() -> dt.datetime:
        return dt.datetime.now(dt.UTC)

    sync()
    for path, list_name in data.write(tmp_path / "files", contacts=IMPORTED).imports:
        import_file(engine, path, list_name=list_name, now=now())
    # A few that come to the CRM have complained or left before, or their address is known to be bad.
    data.engagement(engine, now())
    for turn in range(3):
        for _ in range(150):
            crm.change()
        with reading(engine) as connection:
            known = connection.execute(sa.select(SourceContact.contact_id).where(SourceContact.source == source.NAME)).scalars().all()
            some = connection.execute(sa.select(Contact.id, Contact.address_hash).where(Contact.id.in_(known), Contact.id % 40 == turn)).all()
        left, bounced = some[::2], some[1::2]
        assert left
        assert bounced
        transact(engine, lambda connection, left=left: consent.unsubscribe(connection, [row.id for row in left], scope="all", now=now()))
        hashes = [row.address_hash for row in bounced]
        transact(engine, lambda connection, hashes=hashes: consent.suppress(connection, hashes, reason="bounce", now=now()))
        sync()
    with reading(engine) as connection:
        campaign_id = connection.execute(sa.select(Campaign.id).where(Campaign.key == data.EARLIER[0][0])).scalar_one()
    data.opens_and_clicks(engine, campaign_id, now(), seed=1)
    sync()
    theirs = crm.counts()
    with reading(engine) as connection:
        ours = source.count(connection)
    assert ours == {name: theirs[name] for name in ours}
    assert all(theirs["changes"].values())
    assert set(ours["events"]) == {"open", "click", "unsubscribe", "suppression"}
    assert ours["unsubscribed"] > 40
