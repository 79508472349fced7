"""What is taken and what is refused, by a real Exim with a real verifier beside it."""

from __future__ import annotations

import datetime as dt
import email
import random
import re
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from email.message import EmailMessage
from email.mime.base import MIMEBase
from email.mime.message import MIMEMessage
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText

import pytest
import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.database.engine import create_engine
from mail_pipelines.database.models import State
from mail_pipelines.delivery.evidence import Evidence, Kind
from mail_pipelines.dispatch import servers
from mail_pipelines.inbound import reading, reports
from mail_pipelines.messages.compilation import compile_content
from mail_pipelines.messages.composing import Recipient, SenderIdentity, compose
from mail_pipelines.messages.keyring import derive
from mail_pipelines.messages.tokens import DeliveryToken, sign_delivery
from tests.campaigns.parts import NOW, counters_equal_ledger, fill_ledger, ledger_states, make_campaign
from tests.dispatch.world import CONTENT
from tests.inbound.mails import complaint, dsn, request, token
from tests.inbound.receiving import KEY, Receiving, key_ring
from tests.parts.processes import wait_for

pytestmark = pytest.mark.server
TOKEN = sign_delivery(DeliveryToken(7, 12, 1), KEY.encode())


def forged(count: int) -> list[str]:
    draw = random.Random(5)
    letters = "abcdefghijklmnopqrstuvwxyz234567"
    tokens = ["".join(draw.choices(letters, k=48)) for _ in range(count // 2)]
    # As near as can be: another letter somewhere in a token that verifies, in the part that names people or in the hash.
    while len(tokens) < count:
        place = draw.randrange(48)
        if (letter := draw.choice(letters)) != TOKEN[place]:
            tokens.append(TOKEN[:place] + letter + TOKEN[place + 1 :])
    return [f"{draw.choice('bu')}+{token}@bounces.example.test" for token in tokens]


def test_forged_recipients_are_refused_and_none_is_stored(receiving: Receiving) -> None:
    before = receiving.stored()
    recipients = forged(10_000)
    # The first one is looked up in a database that nobody has opened yet: who asks beside it is told to come again.
    assert receiving.offer(recipients[:1]) == [b"550 5.1.1 no such address"]
    groups = [recipients[start : start + 100] for start in range(0, len(recipients), 100)]
    with ThreadPoolExecutor(4) as pool:
        replies = [reply for group in pool.map(receiving.offer, groups) for reply in group]
    assert Counter(replies) == {b"550 5.1.1 no such address": 10_000}
    assert receiving.stored() == before


def test_what_is_no_address_of_ours_is_refused(receiving: Receiving) -> None:
    before = receiving.stored()
    wrong = [
        "postmaster@x.test",
        "someone@elsewhere.test",
        f"{TOKEN}@x.test",
        f"a+{TOKEN}@x.test",
        f"b+{TOKEN[:-1]}@x.test",
        f"b+{TOKEN}b@x.test",
        f"b-{TOKEN}@x.test",
    ]
    assert receiving.offer(wrong) == [b"550 5.1.1 no such address"] * len(wrong)
    assert receiving.stored() == before


def test_each_kind_of_address_has_its_maildir_and_the_letters_do_not_matter(receiving: Receiving) -> None:
    assert receiving.send(f"B+{TOKEN.upper()}@Bounces.Example.Test", dsn(TOKEN)) == 250
    assert receiving.send(f"u+{TOKEN}@any.test", request(TOKEN), "someone@example.net") == 250
    assert receiving.send("FBL@bounces.example.test", complaint(TOKEN), "staff@mailbox.example.net") == 250
    for folder in ("bounces", "unsubscribes", "complaints"):
        (path,) = receiving.filed(folder)
        assert re.search(rb"^Envelope-to: <?(b|u|fbl)", path.read_bytes(), re.MULTILINE | re.IGNORECASE)
        path.unlink()
    wait_for(lambda: receiving.stored() == [], what="an empty queue")


def test_many_messages_on_one_connection_are_filed_at_once(receiving: Receiving) -> None:
    with receiving.connect() as client:
        for _ in range(25):
            client.sendmail("", [f"b+{TOKEN}@x.test"], dsn(TOKEN))
    for path in receiving.filed("bounces", 25):
        path.unlink()
    wait_for(lambda: receiving.stored() == [], what="an empty queue")


def test_a_forged_header_of_the_receiving_server_is_taken_out(receiving: Receiving) -> None:
    other = sign_delivery(DeliveryToken(8, 99, 0), KEY.encode())
    assert receiving.send(f"b+{TOKEN}@x.test", f"Envelope-to: u+{other}@x.test\r\n".encode() + dsn(TOKEN)) == 250
    (path,) = receiving.filed("bounces")
    data = path.read_bytes()
    path.unlink()
    assert other.encode() not in data
    found = reports.read(data, key_ring(), NOW)
    assert isinstance(found, Evidence)
    assert (found.kind, found.contact_id) == (Kind.BOUNCE_REPORT, 12)


def test_only_feedback_reports_are_taken_at_the_complaint_address(receiving: Receiving) -> None:
    assert receiving.send("fbl@bounces.example.test", b"Subject: buy now\r\n\r\nHello.\r\n") == 550
    assert receiving.send("fbl@bounces.example.test", dsn(TOKEN)) == 550
    assert receiving.stored() == []


def test_without_the_verifier_senders_are_asked_to_come_again(receiving: Receiving) -> None:
    """Neither is a bounce lost nor a forged one taken; what is no token at all is still refused for good."""
    good, wrong = f"b+{TOKEN}@x.test", "nobody@x.test"
    away = receiving.folders.verifier.with_name("away")
    receiving.folders.verifier.rename(away)
    assert receiving.offer([good, wrong]) == [b"451 4.3.0 cannot look up addresses now", b"550 5.1.1 no such address"]
    # One that listens and says nothing, half an answer, or ends at once.
    for answer in (None, b"y", b"yes\n", b""):
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(str(receiving.folders.verifier))
            receiving.folders.verifier.chmod(0o666)
            silent.listen()
            with ThreadPoolExecutor(1) as pool:
                replies = pool.submit(receiving.offer, [good])
                connection, _ = silent.accept()
                if answer is not None:
                    connection.sendall(answer)
                    connection.close()
                assert replies.result() == [b"451 4.3.0 cannot look up addresses now"], answer
                connection.close()
        receiving.folders.verifier.unlink()
    away.rename(receiving.folders.verifier)
    assert receiving.offer([good]) == [b"250 Accepted"]


def test_mail_of_a_server_is_taken_also_while_the_database_is_away(receiving: Receiving) -> None:
    own, other = (f"b+{token(12, 1, 7, key=derive(KEY.encode(), name).decode())}@x.test" for name in ("mx1", "mx2"))
    engine = create_engine(f"sqlite:///{receiving.database}")
    servers.register(engine, "mx1", kind="exim", host="127.0.0.1", port=25, now=NOW)
    engine.dispose()
    wait_for(lambda: receiving.offer([own]) == [b"250 Accepted"], what="the key of the new server")
    away = receiving.database.rename(receiving.database.with_name("away"))
    receiving.restart()
    # The other one may be new: its sender tries again.
    assert receiving.offer([own, other]) == [b"250 Accepted", b"451 4.3.0 cannot look up addresses now"]
    away.rename(receiving.database)
    receiving.restart()
    assert receiving.offer([own, other]) == [b"250 Accepted", b"550 5.1.1 no such address"]


def test_a_death_of_either_part_ends_the_other_and_a_new_start_takes_over(receiving: Receiving) -> None:
    receiving.process.kill()
    receiving.process.wait()
    # Exim has lost its verifier with the process that ran it: nothing is taken until the next start, which ends the Exim that was left.
    assert receiving.offer([f"b+{TOKEN}@x.test"]) == [b"451 4.3.0 cannot look up addresses now"]
    receiving.restart()
    assert receiving.offer([f"b+{TOKEN}@x.test"]) == [b"250 Accepted"]


def test_a_real_bounce_goes_all_the_way_into_the_ledger(receiving: Receiving, engine: sa.Engine) -> None:
    """A destination takes a composed message and sends a notification to its return path; a person follows List-Unsubscribe."""
    make_campaign(engine, state="sending")
    fill_ledger(engine, 1, {State.UNKNOWN: 1, State.DELIVERED: 2})
    sender = SenderIdentity(KEY.encode(), "bounces.example.test", "https://mail.example.test", NOW, "c", "b", "sender")
    compiled = compile_content(CONTENT, {"first_name": "text"}, lambda urls: range(1, len(urls) + 1))
    sent = {number: compose(compiled, Recipient(1, number, 0, f"person{number}@example.net", {}), sender) for number in (1, 2, 3)}
    for number in (1, 2):
        assert receiving.send(sent[number].envelope_sender, notification(sent[number].data)) == 250
    mailto = re.search(rb"<mailto:(\S+)>", sent[3].data)
    assert mailto
    assert receiving.send(mailto[1].decode(), b"Subject: unsubscribe\r\n\r\n", "person3@example.net") == 250
    receiving.filed("bounces", 2)
    receiving.filed("unsubscribes")
    settings = config.load({"MAIL_PIPELINES_SENDING__TOKEN_KEY": KEY, "MAIL_PIPELINES_INBOUND__FOLDER": str(receiving.folders.root)})
    report = reading.read(engine, settings, dt.datetime.now(dt.UTC))
    assert report.numbers() == {"bounce_report": 2, "unsubscribed": 1}
    assert ledger_states(engine, 1) == {State.BOUNCED: 1, State.DELIVERED: 2}
    assert counters_equal_ledger(engine, 1)
    assert [path for path in receiving.stored() if path.parent.name != "done"] == []


def notification(message: bytes) -> bytes:
    """As a mail server makes one: the standard library's, with the whole message attached."""
    report = MIMEMultipart("report", report_type="delivery-status")
    report["From"], report["Subject"] = "postmaster@example.net", "Undeliverable"
    report.attach(MIMEText("It could not be delivered."))
    status = EmailMessage()
    status["Final-Recipient"], status["Action"], status["Status"] = "rfc822; x@example.net", "failed", "5.1.1"
    status["Diagnostic-Code"] = "smtp; 550 5.1.1 user unknown"
    part = MIMEBase("message", "delivery-status")
    host = EmailMessage()
    host["Reporting-MTA"] = "dns; mx.example.net"
    part.set_payload([host, status])
    report.attach(part)
    report.attach(MIMEMessage(email.message_from_bytes(message)))
    return report.as_bytes()
