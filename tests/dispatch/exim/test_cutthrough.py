"""What the configuration makes of Exim: the gate before every message, and destinations that misbehave in ways a catcher does not."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import smtplib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mail_pipelines.dispatch import permit
from mail_pipelines.dispatch.exim import instance, log
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.dispatch.journal import Evidence, Journal, Kind
from mail_pipelines.messages.tokens import DeliveryToken, sign_delivery
from tests.dispatch.test_smtp import GOOD, Script, serve
from tests.parts.processes import free_port, listens, wait_for

pytestmark = pytest.mark.server

TOKEN = "mfrggzdfmztwq2lknnwg23tpobyxe43uov3ho6dzpj2gk3tf"
SENDER = f"b+{TOKEN}@bounces.example.test"
BODY = b"Subject: x\r\n\r\nHello.\r\n"


@dataclass
class Exim:
    """A running instance whose destinations listen on `far`."""

    own: instance.Instance
    far: int

    def journal(self) -> Journal:
        return Journal(self.own.folders.journal, log.parse, log.continues)

    def send(
        self, script: Script, *, greeting: str | None = None, in_body: Callable[[permit.Permit], None] = lambda _: None
    ) -> tuple[str, list[bytes], Evidence]:
        """Offer one message to a destination that follows the script: the last reply, what the destination got, and what the journal says.

        `in_body` is called when the body is on its way, before its final dot.
        """
        position = self.journal().end()
        granted = permit.grant(self.own.folders.permits, 7, seconds=600)
        received: list[bytes] = []

        def talk() -> str:
            with smtplib.SMTP(self.own.address, self.own.port, timeout=120) as client:
                client.ehlo(greeting or granted.name)
                for command in (f"MAIL FROM:<{SENDER}>", "RCPT TO:<someone@small.test>", "DATA"):
                    code, text = client.docmd(command)
                    if code >= 400:
                        return f"{code} {text.decode()}"
                client.send(BODY)
                in_body(granted)
                client.send(b".\r\n")
                code, text = client.getreply()
                return f"{code} {text.decode()}"

        async def both() -> str:
            server = await serve(GOOD | script, received, port=self.far)
            try:
                return await asyncio.to_thread(talk)
            finally:
                server.close()

        try:
            return asyncio.run(both()), received, self.journal().evidence(position, 7)
        finally:
            granted.release()


@pytest.fixture(scope="module")
def exim() -> Iterator[Exim]:
    folder = Path(tempfile.mkdtemp(prefix="mail-pipelines-"))
    folder.chmod(0o711)
    folders = ServerFolders(folder / "run", folder / "log", folder / "mail")
    binary, port, far = instance.find_binary(), free_port(), free_port()
    own = instance.Instance(binary, instance.account_for(binary), folders, "127.0.0.1", port, "mail.example.test", (("127.0.0.1", far),))
    instance.prepare(own)
    daemon = instance.start(own, folders.log / "exim.out")
    # It listens before it writes its first line.
    wait_for(lambda: listens(port) and folders.journal.exists(), what="Exim")
    yield Exim(own, far)
    instance.stop(daemon.pid)
    daemon.wait()
    shutil.rmtree(folder)


def test_a_message_goes_through_while_it_is_received(exim: Exim) -> None:
    reply, received, evidence = exim.send({})
    assert reply.startswith("250 OK")
    assert b"\r\nHello.\r\n" in received[0]
    # The permit's name is between the sender and its server: a destination that knew it could speak in the server's name.
    assert re.search(rb"Received: from localhost by mail\.example\.test with esmtp id [0-9A-Za-z-]+;", received[0])
    assert not re.search(rb"c7\.\d", received[0])
    assert evidence.covered
    assert evidence.outcomes[TOKEN].kind is Kind.DELIVERED
    assert evidence.alarms == 0


def test_a_permit_withdrawn_in_mid_body_stops_the_message(exim: Exim) -> None:
    reply, received, evidence = exim.send({}, in_body=lambda granted: granted.withdraw())
    assert re.fullmatch(r"451 4\.7\.0 permit withdrawn c7\.\d+", reply)
    assert received == []
    assert evidence.outcomes[TOKEN].kind is Kind.VOID


@pytest.mark.parametrize("greeting", ["hello", "c7", "c7.9999999999", "c8.9999999999", "[127.0.0.1]", "c7.1", "c7.99999999999999999999"])
def test_without_a_permit_no_recipient_is_taken(exim: Exim, greeting: str) -> None:
    reply, received, evidence = exim.send({}, greeting=greeting)
    assert (reply, received) == (f"451 4.7.0 no permit {greeting}", [])
    # Of an offer under the permit of another claim nothing is said here.
    assert evidence.outcomes.keys() <= {TOKEN}
    assert all(outcome.kind is Kind.VOID for outcome in evidence.outcomes.values())


def test_a_permit_dies_by_the_clock(exim: Exim) -> None:
    past = exim.own.folders.permits / f"c7.{int(time.time()) - 1}"
    past.touch()
    assert exim.send({}, greeting=past.name)[0] == f"451 4.7.0 no permit {past.name}"
    past.unlink()


def test_a_sender_that_names_no_message_is_refused(exim: Exim) -> None:
    with smtplib.SMTP(exim.own.address, exim.own.port, timeout=120) as client:
        client.ehlo("c7.9999999999")
        for address in ("", "someone@shop.test", "b+short@bounces.test", f"b+{TOKEN}x@bounces.test"):
            assert client.mail(address)[0] == 550


@pytest.mark.parametrize("script", [{"DATA": "550 5.7.1 not you"}, {"DATA": "451 4.3.0 later"}, {"DATA": None}])
def test_a_body_that_the_destination_does_not_take_is_deferred_and_raises_an_alarm(exim: Exim, script: Script) -> None:
    """Exim falls back to receiving the message. It is thrown away: the platform offers it again. The line about that is the alarm."""
    position = exim.journal().end()
    reply, received, evidence = exim.send(script)
    assert reply.startswith("250 OK")
    assert evidence.outcomes[TOKEN].kind is Kind.DEFERRED
    assert received == []
    wait_for(lambda: not list((exim.own.spool / "input").glob("*")), what="an empty queue")
    evidence = exim.journal().evidence(position, 7)
    assert (evidence.outcomes[TOKEN].kind, evidence.alarms, evidence.unknown_forms) == (Kind.DEFERRED, 1, 0)
    assert exim.own.folders.journal.read_bytes()[position.offset :].count(b"=> :blackhole: <someone@small.test> R=not_delivered") == 1


@pytest.mark.parametrize("script", [{"body": None}, {"body": "nonsense"}, {"body": "354 what?"}])
def test_an_answer_that_is_none_leaves_the_intent_open(exim: Exim, script: Script) -> None:
    reply, received, evidence = exim.send(script)
    assert reply == "450 Onward transmission not accepted"
    assert len(received) == 1
    assert evidence.outcomes == {}
    assert list(evidence.intents) == [TOKEN]


def test_an_answer_of_several_lines_keeps_its_words(exim: Exim) -> None:
    _, _, evidence = exim.send({"body": '550-5.7.1 first "line"\r\n550 5.7.1 second \\ line'})
    outcome = evidence.outcomes[TOKEN]
    assert (outcome.kind, outcome.code, outcome.enhanced, outcome.text) == (Kind.BOUNCED, 550, "5.7.1", 'first "line" second \\ line')
    assert evidence.bad_lines == 0


@pytest.mark.parametrize(
    ("script", "kind", "code"),
    [
        ({"connect": "554 5.7.1 blocked"}, Kind.DEFERRED, 554),
        ({"connect": "421 4.7.0 busy"}, Kind.DEFERRED, 421),
        ({"connect": None}, Kind.UNREACHABLE, None),
        ({"MAIL": "550 5.7.1 bad sender"}, Kind.BOUNCED, 550),
        ({"RCPT": "550 5.1.1 unknown"}, Kind.BOUNCED, 550),
        ({"RCPT": "452 4.2.2 full"}, Kind.DEFERRED, 452),
        ({"RCPT": None}, Kind.UNREACHABLE, None),
    ],
)
def test_each_refusal_before_the_body_is_read_as_what_it_is(exim: Exim, script: Script, kind: Kind, code: int | None) -> None:
    _, received, evidence = exim.send(script)
    outcome = evidence.outcomes[TOKEN]
    assert (outcome.kind, outcome.code, received) == (kind, code, [])


def test_five_hundred_connections_send_at_once(exim: Exim) -> None:
    """As many as a server may be allowed to keep to all providers together: each is taken, and has a message at its destination while all others have."""
    connections = 500
    position = exim.journal().end()
    granted = permit.grant(exim.own.folders.permits, 8, seconds=600)
    tokens = [sign_delivery(DeliveryToken(1, number, 0), b"a key for tests") for number in range(connections)]
    waiting = asyncio.Barrier(connections)

    async def converse(token: str) -> str:
        reader, writer = await asyncio.open_connection(exim.own.address, exim.own.port)

        async def reply() -> str:
            while (line := (await reader.readline()).decode())[3:4] == "-":
                pass
            return line.rstrip()

        async def command(text: str) -> str:
            writer.write(text.encode() + b"\r\n")
            return await reply()

        await reply()
        for text in (f"EHLO {granted.name}", f"MAIL FROM:<b+{token}@bounces.example.test>", "RCPT TO:<someone@small.test>", "DATA"):
            answer = await command(text)
            assert answer[:1] in "23", answer
        await waiting.wait()
        answer = await command("Subject: x\r\n\r\nHello.\r\n.")
        writer.close()
        return answer[:3]

    async def all_at_once() -> tuple[list[str], list[bytes]]:
        received: list[bytes] = []
        server = await serve(GOOD, received, port=exim.far)
        try:
            return await asyncio.gather(*map(converse, tokens)), received
        finally:
            server.close()

    try:
        replies, received = asyncio.run(asyncio.wait_for(all_at_once(), 250))
    finally:
        granted.release()
    assert (replies, len(received)) == (["250"] * connections, connections)
    outcomes = exim.journal().evidence(position, 8).outcomes
    assert [outcomes[token].kind for token in tokens] == [Kind.DELIVERED] * connections


def test_a_full_spool_of_the_past_is_cleaned(exim: Exim) -> None:
    folder = exim.own.spool / "input"
    old, new = folder / "1xVpQB-0005at-08-D", folder / "1xVpQB-0005at-09-D"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    instance.prepare(exim.own)
    assert (old.exists(), new.exists()) == (False, True)
    new.unlink()


def test_a_value_that_could_change_the_configuration_is_refused(exim: Exim) -> None:
    for hostname in ("a\nb", "x ${run{id}}", "", "MP_PORT"):
        with pytest.raises(instance.EximError, match="MP_HOSTNAME is"):
            instance.configure(replace(exim.own, hostname=hostname))


def test_folders_that_exim_cannot_reach_are_named(exim: Exim, tmp_path: Path) -> None:
    """Exim of an ordinary user works as that user and reaches its folders; that of root does not reach a closed home."""
    closed = replace(exim.own, folders=ServerFolders(tmp_path / "run", tmp_path / "log", tmp_path / "mail"))
    tmp_path.chmod(0o700)
    if os.geteuid() == 0:
        with pytest.raises(instance.EximError, match=r"cannot use .*/permit: set server\.run_folder"):
            instance.prepare(closed)
    else:
        instance.prepare(closed)
