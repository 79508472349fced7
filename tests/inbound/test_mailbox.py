"""An IMAP mailbox is emptied into the ledger: nothing twice, nothing lost, whatever fails in between."""

from __future__ import annotations

import datetime as dt
import imaplib
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.config import Settings
from mail_pipelines.database.models import State
from mail_pipelines.inbound import mailbox, maildir, reading
from mail_pipelines.inbound.folders import InboundFolders
from mail_pipelines.inbound.mailbox import Address, MailboxError
from tests.campaigns.parts import fill_ledger, ledger_states, make_campaign
from tests.inbound.imap import PASSWORD, Dovecot
from tests.inbound.mails import complaint, dsn, request, token
from tests.inbound.receiving import KEY
from tests.parts.processes import free_port

pytestmark = pytest.mark.server
NOW = dt.datetime(2026, 3, 2, 11, 0, tzinfo=dt.UTC)


@pytest.fixture(scope="module")
def dovecot() -> Iterator[Dovecot]:
    server = Dovecot()
    yield server
    server.end()


@pytest.fixture
def settings(dovecot: Dovecot, tmp_path: Path) -> Settings:
    """Each test has its own folder for what was fetched."""
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    environ = {
        "MAIL_PIPELINES_HOME": str(tmp_path / "home"),
        "MAIL_PIPELINES_SENDING__TOKEN_KEY": KEY,
        "MAIL_PIPELINES_INBOUND__IMAP_URL": dovecot.url,
        "MAIL_PIPELINES_INBOUND__IMAP_PASSWORD_FILE": str(tmp_path / "password"),
        "MAIL_PIPELINES_INBOUND__IMAP_DONE": f"Done {tmp_path.name}",
    }
    return config.load(environ)


def done(dovecot: Dovecot, settings: Settings) -> int:
    return dovecot.count(f'"{settings.inbound.imap_done}"')


def test_a_mailbox_is_emptied_into_the_ledger(dovecot: Dovecot, settings: Settings, engine: sa.Engine) -> None:
    make_campaign(engine, state="sending")
    fill_ledger(engine, 1, {State.UNKNOWN: 4})
    dovecot.add(dsn(token(1)), complaint(token(2)), request(token(3)), b"Subject: buy\r\n\r\nnow\r\n")
    numbers = reading.read(engine, settings, NOW).numbers()
    assert numbers == {"fetched": 4, "bounce_report": 1, "complained": 1, "unsubscribed": 1, "ignored_no_token": 1}
    assert ledger_states(engine, 1) == {State.UNKNOWN: 1, State.BOUNCED: 1, State.DELIVERED: 2}
    assert (dovecot.count("INBOX"), done(dovecot, settings)) == (0, 4)
    assert reading.read(engine, settings, NOW).numbers() == {}


def test_a_poll_that_dies_before_the_move_fetches_the_same_again(dovecot: Dovecot, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "maildir"
    dovecot.add(dsn(token(1)), dsn(token(2)))
    before = imaplib.IMAP4.uid

    def dies(client: imaplib.IMAP4, command: str, *arguments: str) -> object:
        if command == "MOVE":
            raise ConnectionResetError("gone")
        return before(client, command, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(imaplib.IMAP4, "uid", dies)
        with pytest.raises(MailboxError, match="gone"):
            mailbox.fetch(settings.inbound, folder)
    (kept,) = maildir.waiting(folder, 10)
    assert dovecot.count("INBOX") == 2
    assert mailbox.fetch(settings.inbound, folder) == 2
    assert (len(maildir.waiting(folder, 10)), kept.path.exists()) == (2, True)
    assert (dovecot.count("INBOX"), done(dovecot, settings)) == (0, 2)


def test_a_mailbox_that_is_away_does_not_keep_the_maildirs_from_being_read(settings: Settings, engine: sa.Engine) -> None:
    make_campaign(engine, state="sending")
    fill_ledger(engine, 1, {State.DELIVERED: 1})
    maildir.put(InboundFolders.of(settings.inbound).mail / "bounces", "1", dsn(token(1)))
    away = settings.inbound.model_copy(update={"imap_url": f"imap://me@127.0.0.1:{free_port()}"})
    with pytest.raises(MailboxError, match="cannot be polled"):
        reading.read(engine, settings.model_copy(update={"inbound": away}), NOW)
    assert maildir.waiting(InboundFolders.of(settings.inbound).mail / "bounces", 10) == []


def test_a_wrong_password_is_named(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(MailboxError, match=r"cannot be polled: .*Authentication failed.*see inbound\.imap_url and its password"):
        mailbox.fetch(settings.inbound.model_copy(update={"imap_password": "wrong"}), tmp_path / "maildir")


def test_an_address_of_a_mailbox_is_read() -> None:
    assert Address.parse("imaps://bounces%40shop.test@imap.example.net/Back/In") == Address("imap.example.net", 993, "bounces@shop.test", "Back/In", True)
    assert Address.parse("imap://me@[::1]:1143") == Address("::1", 1143, "me", "INBOX", False)


@pytest.mark.parametrize(
    "url", ["imaps://imap.example.net", "https://me@imap.example.net", "imaps://me:pass-word@imap.example.net", "imaps://me@h:port", "me@h"]
)
def test_a_wrong_address_is_named_without_showing_it(url: str) -> None:
    with pytest.raises(MailboxError, match=r"inbound\.imap_url is no") as raised:
        Address.parse(url)
    assert "pass-word" not in str(raised.value)
