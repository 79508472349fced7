"""From files to the database: each message once, whatever is killed, and nothing that is wrong with one stops the rest."""

from __future__ import annotations

import datetime as dt
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.campaigns import progress
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import reading as reading_of
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Delivery, DeliveryEvent, State, Suppression
from mail_pipelines.delivery import evidence, statistics
from mail_pipelines.inbound import maildir, reading
from mail_pipelines.inbound.folders import InboundFolders
from tests.campaigns.parts import NOW, counters_equal_ledger, fill_ledger, ledger_states, load, make_campaign
from tests.inbound.mails import complaint, dsn, qmail_bounce, request, token, vacation
from tests.inbound.receiving import KEY

LATER = NOW + dt.timedelta(hours=2)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return config.load({"MAIL_PIPELINES_HOME": str(tmp_path / "home"), "MAIL_PIPELINES_SENDING__TOKEN_KEY": KEY})


@pytest.fixture
def mail(settings: Settings) -> Path:
    return InboundFolders.of(settings.inbound).mail


@pytest.fixture
def ledger(engine: sa.Engine) -> sa.Engine:
    """Campaign 1: recipients 1 and 2 claimed, 3 and 4 unknown, 5 to 9 delivered."""
    make_campaign(engine, state="sending")
    fill_ledger(engine, 1, {State.CLAIMED: 2, State.UNKNOWN: 2, State.DELIVERED: 5}, sort_key=int(NOW.timestamp()))
    return engine


def add(mail: Path, folder: str, *messages: bytes, at: dt.datetime = NOW) -> list[str]:
    names = [f"{at.timestamp():.0f}.{folder}.{number}" for number in range(len(messages))]
    for name, message in zip(names, messages, strict=True):
        maildir.put(mail / folder, name, message)
        os.utime(mail / folder / "new" / name, (at.timestamp(), at.timestamp()))
    return names


def files(mail: Path) -> dict[str, set[str]]:
    """The names of the files of all maildirs by folder."""
    found: dict[str, set[str]] = {}
    for path in mail.rglob("*"):
        if path.is_file():
            found.setdefault(path.parent.name, set()).add(path.name)
    return found


def facts(engine: sa.Engine) -> dict[str, int]:
    with reading_of(engine) as connection:
        return progress.facts(connection, 1)


MAILS = [
    dsn(token(3)),
    dsn(token(5)),
    qmail_bounce(token(6)),
    complaint(token(7)),
    request(token(4)),
    vacation(token(8)),
    dsn(token(9), action="delayed", status="4.4.1"),
]


def test_each_kind_of_mail_has_its_effect_and_is_put_away(ledger: sa.Engine, settings: Settings, mail: Path) -> None:
    add(mail, "bounces", *MAILS)
    report = reading.read(ledger, settings, LATER)
    assert report.numbers() == {"bounce_report": 3, "complained": 1, "unsubscribed": 1, "ignored_no_report": 1, "ignored_delayed": 1}
    assert ledger_states(ledger, 1) == {State.CLAIMED: 2, State.BOUNCED: 1, State.DELIVERED: 6}
    assert facts(ledger) == {"complained": 1, "late_bounce": 2, "unsubscribed": 1}
    assert counters_equal_ledger(ledger, 1)
    with reading_of(ledger) as connection:
        numbers = statistics.read(connection, load(ledger)).numbers()
    assert (numbers["late_bounced"], numbers["complained"], numbers["unsubscribed"]) == (2, 1, 1)
    assert {folder: len(names) for folder, names in files(mail).items()} == {"done": len(MAILS)}
    assert reading.read(ledger, settings, LATER).numbers() == {}


def test_what_is_read_twice_counts_once(ledger: sa.Engine, settings: Settings, mail: Path) -> None:
    """A process that dies between the commit and the move leaves its files where they were."""
    names = add(mail, "bounces", *MAILS)
    reading.read(ledger, settings, LATER)
    before = (ledger_states(ledger, 1), facts(ledger))
    for name in names:
        (mail / "bounces/done" / name).rename(mail / "bounces/new" / name)
    # Two months later, and beside copies that came by another way.
    add(mail, "mailbox", *MAILS)
    numbers = reading.read(ledger, settings, LATER + dt.timedelta(days=60)).numbers()
    assert (ledger_states(ledger, 1), facts(ledger)) == before
    assert numbers == {"known": 10, "ignored_no_report": 2, "ignored_delayed": 2}
    assert counters_equal_ledger(ledger, 1)


def test_a_database_that_fails_leaves_the_mail_where_it_was(ledger: sa.Engine, settings: Settings, mail: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = add(mail, "bounces", *MAILS[:4])
    transact(ledger, lambda connection: connection.exec_driver_sql("ALTER TABLE campaign_facts RENAME TO elsewhere"))
    try:
        with pytest.raises(Exception, match=r"campaign_facts|schema"):
            reading.read(ledger, settings, LATER)
    finally:
        transact(ledger, lambda connection: connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO campaign_facts"))
    assert files(mail)["new"] == set(names)
    with reading_of(ledger) as connection:
        assert connection.execute(sa.select(DeliveryEvent.id)).all() == []
    assert reading.read(ledger, settings, LATER).numbers() == {"bounce_report": 3, "complained": 1}


def test_mail_about_what_a_server_has_in_hand_waits(ledger: sa.Engine, settings: Settings, mail: Path) -> None:
    names = add(mail, "bounces", dsn(token(1)), dsn(token(5)))
    assert reading.read(ledger, settings, LATER).numbers() == {"bounce_report": 1, "too_early": 1}
    assert files(mail) == {"new": {names[0]}, "done": {names[1]}}
    transact(ledger, lambda connection: connection.execute(sa.update(Delivery).where(Delivery.contact_id == 1).values(state=int(State.DELIVERED))))
    assert reading.read(ledger, settings, LATER).numbers() == {"bounce_report": 1}
    assert facts(ledger) == {"late_bounce": 2}


def test_bad_files_are_put_aside_with_the_reason_and_the_rest_is_read(ledger: sa.Engine, settings: Settings, mail: Path, tmp_path: Path) -> None:
    deep = b"".join(b'Content-Type: multipart/mixed; boundary="%d"\r\n\r\n--%d\r\n' % (n, n) for n in range(3000))
    add(mail, "bounces", f"To: b+{token(5)}@x\r\n".encode() + deep, dsn(token(6)))
    new = mail / "bounces/new"
    os.mkfifo(new / "0.pipe")
    (tmp_path / "secret").write_bytes(dsn(token(7)))
    (new / "0.link").symlink_to(tmp_path / "secret")
    (new / "0.folder").mkdir()
    assert reading.read(ledger, settings, LATER).numbers() == {"bounce_report": 1, "bad": 4}
    reasons = {path.name: path.read_text() for path in (mail / "bounces/bad").glob("*.why")}
    assert set(reasons) == {"0.pipe.why", "0.link.why", "0.folder.why", f"{NOW.timestamp():.0f}.bounces.0.why"}
    assert "RecursionError" in reasons[f"{NOW.timestamp():.0f}.bounces.0.why"]
    assert list(new.iterdir()) == []


def test_foreign_tokens_are_counted_and_do_nothing(ledger: sa.Engine, settings: Settings, mail: Path) -> None:
    foreign = token(5, key="another key")
    add(mail, "complaints", complaint(foreign), dsn(foreign), b"Subject: buy\r\n\r\nnow\r\n", complaint(token(77)))
    assert reading.read(ledger, settings, LATER).numbers() == {"ignored_foreign_token": 2, "ignored_no_token": 1, "unmatched": 1}
    with reading_of(ledger) as connection:
        assert connection.execute(sa.select(Suppression.id)).all() == []


def test_what_was_read_is_deleted_after_its_days(ledger: sa.Engine, settings: Settings, mail: Path) -> None:
    add(mail, "bounces", *MAILS)
    reading.read(ledger, settings, LATER)
    reading.read(ledger, settings, dt.datetime.now(dt.UTC) + dt.timedelta(days=13.9))
    assert len(files(mail)["done"]) == len(MAILS)
    reading.read(ledger, settings, dt.datetime.now(dt.UTC) + dt.timedelta(days=14.1))
    assert files(mail) == {}


def test_thousands_are_read_in_batches(ledger: sa.Engine, settings: Settings, mail: Path) -> None:
    """No statement for a single message: 1,100 mails are three transactions of some twenty statements."""
    kinds: list[Any] = [dsn, complaint, request]
    add(mail, "bounces", *(kinds[number % 3](token(5 + number % 5)) for number in range(1_100)))
    statements: Counter[str] = Counter()

    def count(_c: object, _cursor: object, statement: str, *_: object) -> None:
        statements[statement.split()[0]] += 1

    sa.event.listen(ledger, "before_cursor_execute", count)
    numbers = reading.read(ledger, settings, LATER).numbers()
    assert sum(numbers.values()) == 1_100
    assert sum(statements.values()) < 3 * 40
    assert facts(ledger) == {"complained": 5, "late_bounce": 5, "unsubscribed": 5}
    assert evidence.BATCH == 500
