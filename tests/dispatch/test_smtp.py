"""Every way a conversation with the mail server can go wrong is a named end: go on, reconnect, stop, doubt."""

from __future__ import annotations

import asyncio

import pytest

from mail_pipelines.dispatch.journal import Kind
from mail_pipelines.dispatch.smtp import Connection, Next, Offer, ServerUnreachable, outcome_of
from mail_pipelines.messages.composing import Message

MESSAGE = Message("b+token@bounces.test", "someone@small.test", "token", b"Subject: x\r\n\r\n.leading dot\r\nbody\r\n")
Script = dict[str, str | None]
# What a well-behaved server says at each stage. None: it closes the connection; "": it says nothing.
GOOD: Script = {"connect": "220 hello", "EHLO": "250 ok", "MAIL": "250 ok", "RCPT": "250 ok", "DATA": "354 go on", "body": "250 2.0.0 kept", "QUIT": "221 bye"}


async def serve(script: Script, received: list[bytes], port: int = 0, host: str = "127.0.0.1") -> asyncio.Server:
    """A server that answers each stage as the script says, on a port of its own or on `port`."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def answer(stage: str) -> bool:
            text = script[stage]
            if text is None:
                writer.close()
                return False
            if text:
                writer.write(text.encode() + b"\r\n")
            return True

        try:
            if not await answer("connect"):
                return
            while line := await reader.readline():
                verb = line.split()[0].decode().upper() if line.split() else ""
                if not await answer(verb if verb in script else "EHLO"):
                    return
                if verb == "DATA" and (script["DATA"] or "").startswith("354"):
                    body = await reader.readuntil(b"\r\n.\r\n")
                    received.append(body)
                    if not await answer("body"):
                        return
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            return
        finally:
            writer.close()

    return await asyncio.start_server(talk, host, port)


def offer(script: Script, *, timeout: float = 0.5) -> tuple[Offer, list[bytes]]:
    received: list[bytes] = []

    async def run() -> Offer:
        server = await serve(GOOD | script, received)
        connection = Connection("127.0.0.1", server.sockets[0].getsockname()[1], timeout)
        try:
            await connection.open()
            await connection.greet("c1.99")
            return await connection.offer(MESSAGE)
        finally:
            await connection.close()
            server.close()

    return asyncio.run(run()), received


def test_a_message_goes_through_with_its_dots_doubled() -> None:
    result, received = offer({})
    assert (result.next, result.doubt) == (Next.GO_ON, False)
    assert result.reply is not None
    assert result.reply.kind is Kind.DELIVERED
    assert b"\r\n..leading dot\r\n" in received[0]


@pytest.mark.parametrize(
    ("script", "following", "doubt", "kind"),
    [
        # Before the body nothing was offered, whatever is said: there is no reply for the message and no doubt.
        ({"MAIL": "550 5.7.1 not you"}, Next.GO_ON, False, None),
        ({"RCPT": "550 5.1.1 unknown"}, Next.GO_ON, False, None),
        ({"RCPT": "450 4.2.0 later"}, Next.GO_ON, False, None),
        ({"RCPT": "451 4.7.0 no permit"}, Next.STOP_CLAIM, False, None),
        ({"RCPT": "421 4.3.2 going down"}, Next.RECONNECT, False, None),
        ({"MAIL": None}, Next.RECONNECT, False, None),
        ({"RCPT": None}, Next.RECONNECT, False, None),
        ({"RCPT": ""}, Next.RECONNECT, False, None),
        ({"MAIL": "what?"}, Next.RECONNECT, False, None),
        # From DATA on the message may have been taken: silence and a lost connection leave doubt.
        ({"DATA": None}, Next.RECONNECT, True, None),
        ({"body": None}, Next.RECONNECT, True, None),
        ({"body": ""}, Next.RECONNECT, True, None),
        ({"body": "nonsense"}, Next.RECONNECT, True, None),
        # Explicit replies after the body.
        ({"body": "554 5.7.1 no"}, Next.GO_ON, False, Kind.BOUNCED),
        ({"body": "451 4.3.0 later"}, Next.GO_ON, False, Kind.DEFERRED),
        ({"body": "421 4.7.0 enough"}, Next.RECONNECT, False, Kind.DEFERRED),
        ({"body": "451 4.7.0 permit withdrawn"}, Next.STOP_CLAIM, False, None),
        ({"body": "452 4.3.1 no space for the journal"}, Next.STOP_CLAIM, False, None),
        ({"body": "450 4.4.2 Onward transmission not accepted"}, Next.GO_ON, False, Kind.UNKNOWN),
    ],
)
def test_each_stage_and_reply_has_its_meaning(script: Script, following: Next, doubt: bool, kind: Kind | None) -> None:
    result, _ = offer(script)
    assert (result.next, result.doubt) == (following, doubt)
    assert (result.reply.kind if result.reply else None) is kind


@pytest.mark.parametrize(
    "script", [{"connect": None}, {"connect": ""}, {"connect": "554 go away"}, {"connect": "\x00\x01 what"}, {"EHLO": None}, {"EHLO": "500 what"}]
)
def test_a_server_that_does_not_greet_is_unreachable(script: Script) -> None:
    with pytest.raises(ServerUnreachable):
        offer(script)


def test_a_server_that_is_not_there_is_unreachable() -> None:
    async def run() -> None:
        await Connection("127.0.0.1", 1, 0.5).open()

    with pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1:1"):
        asyncio.run(run())


def test_replies_are_read_with_and_without_enhanced_code() -> None:
    assert (outcome_of(550, "5.1.1 no such user").enhanced, outcome_of(550, "no such user").enhanced) == ("5.1.1", None)
    assert outcome_of(250, "1.2.3.4 is fine").enhanced is None
