"""A source that hangs ends its run, and keeps no place from the others."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from mail_pipelines.sources import landing, running, status, telling
from mail_pipelines.sources.declaration import Source
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds import patience
from tests.sources.conftest import PEOPLE, Declare, engaged
from tests.sources.crm import TOKEN, Answer, Crm, person, serving

pytestmark = pytest.mark.slow


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Ends the waiting of the CRM."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def crm(monkeypatch: pytest.MonkeyPatch, released: threading.Event) -> Iterator[Crm]:
    monkeypatch.setenv("CRM_TOKEN", TOKEN)
    with serving(Crm([person(number) for number in range(PEOPLE)])) as crm:
        yield crm
        released.set()


@pytest.fixture
def source(declare: Declare, crm: Crm) -> Source:
    return declare(
        kind="rest",
        connection={"url": crm.url, "auth": {"type": "bearer", "token_env": "CRM_TOKEN"}},
        contacts={"read": {"path": "contacts", "records": "data"}, "map": {"id": "external_id", "properties.mail": "email"}},
        write_back={"what": ["opens"], "send": {"path": "events", "items": "events", "body": {"id": "key", "who": "external_id"}}},
    )


@contextmanager
def impatient() -> Iterator[None]:
    """Only while nothing comes: a machine that stands still for a moment would hang, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patience, "MOST_SECONDS", 0.3)
        yield


def test_a_source_that_hangs_is_left_and_read_again(engine: sa.Engine, home: Path, crm: Crm, source: Source, released: threading.Event) -> None:
    def hang(*_: object) -> Answer | None:
        released.wait(600)
        return None

    # What is imported first would be broken off in the middle.
    landing.check(source, source.sections["contacts"])
    crm.before = hang
    with impatient(), pytest.raises(SourceError, match="given nothing for"):
        running.run(engine, home, source, "contacts")
    assert not running.is_running(home, "crm")
    standing = status.read(engine, "crm", "contacts")
    assert "it hangs" in (standing.error or "")
    assert standing.ended_at is not None
    crm.before = None
    assert running.run(engine, home, source, "contacts").standing.counts["inserted"] == PEOPLE
    engaged(engine, range(9, 10))
    assert telling.run(engine, home, source).counts["pushed"] == 1
    engaged(engine, range(3))
    crm.at_post = hang
    with impatient(), pytest.raises(SourceError, match="has not answered for"):
        telling.run(engine, home, source)
    crm.at_post = None
    again = telling.run(engine, home, source)
    # What was put off waits for its time.
    assert again.standing.waiting == 3
    assert again.counts.get("dead", 0) == 0


def test_somebody_elses_alarm_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rung, now = threading.Event(), 0.0
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: now))
    before = signal.signal(signal.SIGALRM, lambda *_: rung.set())
    try:
        signal.setitimer(signal.ITIMER_REAL, 300)
        with patience.within(900, SourceError("not now")):
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 300
            now += 200
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        with patience.within(900, SourceError("not now")):
            now += 200
            assert not rung.is_set()
        # It was due meanwhile.
        assert rung.wait(60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
