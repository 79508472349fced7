"""Every way a conversation with the mail server can go wrong is a named ending of the message. Over real sockets."""

from __future__ import annotations

import asyncio
import itertools
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_pipelines.benchmarks.certificates import contexts
from mail_pipelines.dispatch.endings import MEANINGS, Answer, Ending, Next, Stage, answer_of
from mail_pipelines.dispatch.replies import BadReply, Reply, ReplyReader, outcome_of
from mail_pipelines.dispatch.smtp import Connection, Login, Offer, ServerUnreachable
from mail_pipelines.messages.composing import Message

PERMIT = "c1234.99"
Script = dict[str, str | None]
# What a well-behaved server says at each stage. None: it closes the connection; "": it says nothing more.
GOOD: Script = {"connect": "220 hello", "EHLO": "250 ok", "MAIL": "250 ok", "RCPT": "250 ok", "DATA": "354 go on", "body": "250 2.0.0 kept", "QUIT": "221 bye"}
PIPELINED: Script = GOOD | {"EHLO": "250-hello\r\n250 PIPELINING"}
MESSAGES = [
    Message(f"b+token{number}@bounces.test", f"someone{number}@small.test", f"token{number}", b"Subject: %d\r\n\r\n.leading dot\r\nbody\r\n" % number)
    for number in range(4)
]


async def serve(script: Script, received: list[bytes], port: int = 0, host: str = "127.0.0.1") -> asyncio.Server:
    """A server that answers each stage as the script says, on a port of its own or on `port`."""
    return await Far([script], received).serve(port, host)


@dataclass
class Far:
    """A server that answers the stages of message n as `scripts[n]` says (the last one for all after it), and keeps what it gets."""

    scripts: list[Script]
    bodies: list[bytes] = field(default_factory=list)
    verbs: list[str] = field(default_factory=list)
    tls: ssl.SSLContext | None = None
    message: int = -1
    hours: int = 0

    async def serve(self, port: int = 0, host: str = "127.0.0.1") -> asyncio.Server:
        # With the 100 of asyncio, some of many who come at once never get a greeting.
        return await asyncio.start_server(self.talk, host, port, backlog=1024)

    async def time_passes(self, end: asyncio.Future[bytes]) -> None:
        """Let hours pass in no time in this event loop: whoever waits for an answer waits in vain, and a host that is slow is not taken for silent."""
        loop = asyncio.get_running_loop()
        loop.time = lambda: time.monotonic() + self.hours * 3600  # type: ignore[method-assign]
        while not end.done():
            self.hours += 1
            await asyncio.wait([end], timeout=0.01)

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def answer(stage: str) -> str:
            text = self.scripts[max(0, min(self.message, len(self.scripts) - 1))][stage]
            if text is None:
                raise ConnectionAbortedError
            if not text:
                await self.time_passes(asyncio.ensure_future(reader.read()))
                raise ConnectionAbortedError
            writer.write(text.encode() + b"\r\n")
            return text

        in_transaction = False
        try:
            await answer("connect")
            while line := await reader.readline():
                verb = line.split()[0].decode().upper() if line.split() else ""
                self.verbs.append(verb)
                if verb == "STARTTLS":
                    writer.write(b"220 go on\r\n")
                    assert self.tls is not None
                    await writer.start_tls(self.tls)
                    continue
                if verb == "AUTH":
                    writer.write(b"235 welcome\r\n")
                    continue
                if verb == "MAIL" and in_transaction:
                    writer.write(b"503 5.5.1 nested MAIL\r\n")
                    continue
                self.message += verb == "MAIL"
                given = await answer(verb if verb in GOOD else "EHLO")
                # Only a body, RSET and a new greeting end a transaction.
                in_transaction = given.startswith("250") if verb == "MAIL" else in_transaction and verb in ("RCPT", "DATA")
                if verb == "DATA" and given.startswith("354"):
                    in_transaction = False
                    self.bodies.append(await body(reader))
                    await answer("body")
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            return
        finally:
            writer.close()


async def body(reader: asyncio.StreamReader) -> bytes:
    """A message up to the line with the dot, which may be its first."""
    lines = [await reader.readuntil(b"\n")]
    while lines[-1] != b".\r\n":
        lines.append(await reader.readuntil(b"\n"))
    return b"".join(lines)


def connected(far: Far, talk: Callable[[Connection], Awaitable[list[Offer]]], *, timeout: float = 60, greeting: str = PERMIT) -> list[Offer]:
    async def run() -> list[Offer]:
        server = await far.serve()
        connection = Connection("127.0.0.1", server.sockets[0].getsockname()[1], timeout)
        try:
            await connection.open()
            await connection.greet(greeting)
            return await talk(connection)
        finally:
            await connection.close()
            server.close()

    return asyncio.run(run())


async def one_by_one(connection: Connection) -> list[Offer]:
    return [await connection.offer(message) for message in MESSAGES[:2]]


async def ahead(connection: Connection) -> list[Offer]:
    """All messages, each with the envelope of the next, for as long as the connection is good for it."""
    offers = []
    for message, following in zip(MESSAGES, [*MESSAGES[1:], None], strict=True):
        offers.append(await connection.offer(message, following))
        if offers[-1].next is not Next.GO_ON:
            break
    return offers


# --- the table ------------------------------------------------------------------------------------------------------

SAID: dict[Answer, str | None] = {
    Answer.TAKEN: "250 2.0.0 ok",
    Answer.LATER: "451 4.7.0 later",
    Answer.CLOSING: "421 4.3.2 going down",
    Answer.REFUSED: "550 5.7.1 no",
    Answer.FENCED: f"451 4.7.0 no permit {PERMIT}",
    Answer.ONWARD_SILENCE: "450 Onward transmission not accepted",
    Answer.NONSENSE: "what?",
    Answer.LOST: None,
    Answer.SILENT: "",
}


def test_the_table_is_whole() -> None:
    before = set(Answer) - {Answer.TAKEN, Answer.ONWARD_SILENCE}
    expected = {(stage, answer) for stage in (Stage.MAIL, Stage.RCPT, Stage.DATA) for answer in before} | {(Stage.BODY, answer) for answer in Answer}
    assert set(MEANINGS) == expected
    # Nothing is taken in silence before its body was sent, and only a conversation that broke after it leaves doubt.
    for (stage, answer), meaning in MEANINGS.items():
        broken = answer in (Answer.NONSENSE, Answer.LOST, Answer.SILENT)
        assert (meaning.ending is Ending.UNKNOWN) == (stage is Stage.BODY and (broken or answer in (Answer.ONWARD_SILENCE, Answer.CLOSING)))
        assert not broken or meaning.next is Next.RECONNECT


@pytest.mark.parametrize("way", ["one by one", "pipelined", "ahead", "DATA is taken all the same"])
@pytest.mark.parametrize(("stage", "answer"), list(MEANINGS), ids=lambda value: value.name)
def test_each_answer_at_each_stage_has_its_meaning(stage: Stage, answer: Answer, way: str) -> None:
    meaning = MEANINGS[stage, answer]
    good = GOOD if way == "one by one" else PIPELINED
    bad = good | {stage.value: SAID[answer]}
    if way != "one by one" and answer in (Answer.LATER, Answer.REFUSED, Answer.FENCED):
        # RFC 2920 §3.1: what was sent with the refused command is answered too, and DATA is not always refused.
        data = "354 go on" if way == "DATA is taken all the same" else "503 5.5.1 need RCPT"
        bad |= {Stage.MAIL: {"RCPT": "503 5.5.1 need MAIL", "DATA": data}, Stage.RCPT: {"DATA": data}}.get(stage, {})
    first = 1 if way == "ahead" else 0
    far = Far([good] * first + [bad, good])
    talk = ahead if way == "ahead" else one_by_one
    # A server that closes says no more, though more was asked.
    offers = connected(far, talk, timeout=3 if answer is Answer.CLOSING else 60)
    assert [offer.ending for offer in offers[:first]] == [Ending.DELIVERED] * first
    offer = offers[first]
    assert (offer.ending, offer.next) == meaning
    said = SAID[answer] or ""
    explicit = answer not in (Answer.NONSENSE, Answer.LOST, Answer.SILENT)
    assert offer.refusal == (said if explicit and answer is not Answer.TAKEN else "")
    assert (offer.reply is not None) == (stage is Stage.BODY and explicit and answer is not Answer.FENCED)
    bodies = [text for text in far.bodies if text != b".\r\n"]
    assert (b"Subject: %d" % first in b"".join(bodies)) == (stage is Stage.BODY)
    if meaning.next is Next.GO_ON:
        # The connection is good for the next message.
        assert offers[first + 1].ending is Ending.DELIVERED
        assert b"Subject: %d" % (first + 1) in b"".join(bodies)


def test_a_message_goes_through_with_its_dots_doubled() -> None:
    far = Far([PIPELINED])
    (offer, _) = connected(far, one_by_one)
    assert (offer.next, offer.ending) == (Next.GO_ON, Ending.DELIVERED)
    assert offer.reply == Reply(250, "2.0.0 kept")
    assert far.bodies[0] == b"Subject: 0\r\n\r\n..leading dot\r\nbody\r\n.\r\n"


def test_the_next_envelope_goes_with_the_body_before_it() -> None:
    writes: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Reads to the end of what has been written so far, then answers all of it: a client that waits in between would wait for ever."""
        answers = [b"220 hello", b"250-hello\r\n250 PIPELINING", b"250 a\r\n250 b\r\n354 c", *[b"250 d\r\n250 a\r\n250 b\r\n354 c"] * 3, b"250 d", b"221 bye"]
        ends = [b"", b"\r\n", *[b"DATA\r\n"] * 4, b"\r\n.\r\n", b"\r\n"]
        for end, said in zip(ends, answers, strict=True):
            writes.append(await reader.readuntil(end) if end else b"")
            writer.write(said + b"\r\n")
        writer.close()

    far = Far([PIPELINED])
    far.talk = talk  # type: ignore[method-assign]
    offers = connected(far, ahead)
    assert [offer.ending for offer in offers] == [Ending.DELIVERED] * 4
    assert writes[2] == b"MAIL FROM:<b+token0@bounces.test>\r\nRCPT TO:<someone0@small.test>\r\nDATA\r\n"
    assert writes[3].endswith(b"body\r\n.\r\nMAIL FROM:<b+token1@bounces.test>\r\nRCPT TO:<someone1@small.test>\r\nDATA\r\n")
    assert writes[-1] == b"QUIT\r\n"


def test_an_envelope_that_went_ahead_binds_the_connection() -> None:
    far = Far([PIPELINED])

    async def talk(connection: Connection) -> list[Offer]:
        first = await connection.offer(MESSAGES[0], MESSAGES[1])
        assert connection.ahead is MESSAGES[1]
        with pytest.raises(ValueError, match="another message's envelope"):
            await connection.offer(MESSAGES[2])
        return [first]

    connected(far, talk)
    # Its body never comes: the connection is cut, which no server takes for an end of the message.
    assert far.verbs == ["EHLO", "MAIL", "RCPT", "DATA", "MAIL", "RCPT", "DATA"]
    assert len(far.bodies) == 1


def test_a_new_claim_is_greeted_on_the_same_connection() -> None:
    far = Far(
        [PIPELINED | {"RCPT": "550 5.1.1 unknown", "DATA": "503 5.5.1 need RCPT"}, PIPELINED, PIPELINED | {"body": f"451 4.7.0 permit withdrawn {PERMIT}"}]
    )

    async def talk(connection: Connection) -> list[Offer]:
        offers = [await connection.offer(MESSAGES[0])]
        await connection.greet("c2.99")
        # The words about another claim's permit are not the server's about this one.
        return [*offers, await connection.offer(MESSAGES[1]), await connection.offer(MESSAGES[2])]

    offers = connected(far, talk)
    assert [offer.ending for offer in offers] == [Ending.REFUSED, Ending.DELIVERED, Ending.DEFERRED]
    # The greeting ends the transaction that the refusal left open: no RSET.
    assert far.verbs == ["EHLO", "MAIL", "RCPT", "DATA", "EHLO", "MAIL", "RCPT", "DATA", "MAIL", "RCPT", "DATA", "QUIT"]


@pytest.mark.parametrize("extra", ["250 once more", "421 4.4.2 idle too long", "354 go on"])
def test_a_reply_that_nothing_asked_for_is_not_taken_for_the_answer_to_a_body(extra: str) -> None:
    far = Far([PIPELINED | {"DATA": f"354 go on\r\n{extra}"}])
    (offer,) = connected(far, ahead)
    assert (offer.ending, offer.next) == (Ending.NOT_ATTEMPTED, Next.RECONNECT)
    assert far.bodies == []


def test_all_stages_together_take_no_longer_than_the_time_out() -> None:
    """A server that is always just in time would otherwise hold a message for four time-outs, beyond its claim's lease."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 hello\r\n")
        while line := await reader.readline():
            await asyncio.sleep(0 if line.startswith(b"EHLO") else 1.2)
            writer.write({b"EHLO": b"250 slow\r\n", b"DATA": b"354 go on\r\n"}.get(line[:4], b"250 ok\r\n"))

    far = Far([])
    far.talk = talk  # type: ignore[method-assign]
    offers = connected(far, lambda connection: one_message(connection), timeout=3)
    assert (offers[0].ending, offers[0].next) == (Ending.NOT_ATTEMPTED, Next.RECONNECT)


async def one_message(connection: Connection) -> list[Offer]:
    return [await connection.offer(MESSAGES[0])]


# --- setting up -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script", [{"connect": None}, {"connect": ""}, {"connect": "554 go away"}, {"connect": "\x00\x01 what"}, {"EHLO": None}, {"EHLO": ""}, {"EHLO": "500 what"}]
)
def test_a_server_that_does_not_greet_is_unreachable(script: Script) -> None:
    with pytest.raises(ServerUnreachable):
        connected(Far([GOOD | script]), one_message)


def test_a_server_that_is_not_there_is_unreachable() -> None:
    async def run() -> None:
        connection = Connection("127.0.0.1", 1, 0.5)
        try:
            await connection.open()
        finally:
            await connection.close()

    with pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1:1"):
        asyncio.run(run())


def test_the_same_conversation_over_tls_with_a_login(tmp_path: Path) -> None:
    """aiosmtplib brings the connection up; what follows is the same."""
    at_server, at_client = contexts(tmp_path)
    far = Far([GOOD | {"EHLO": "250-hello\r\n250-STARTTLS\r\n250-AUTH PLAIN\r\n250 PIPELINING"}], tls=at_server)

    async def run() -> list[Offer]:
        server = await far.serve()
        connection = Connection("localhost", server.sockets[0].getsockname()[1], 5, tls=at_client, login=Login("worker", "secret"))
        try:
            await connection.open()
            await connection.greet(PERMIT)
            return await ahead(connection)
        finally:
            await connection.close()
            server.close()

    assert [offer.ending for offer in asyncio.run(run())] == [Ending.DELIVERED] * 4
    assert far.verbs[:5] == ["EHLO", "STARTTLS", "EHLO", "AUTH", "EHLO"]
    assert len(far.bodies) == 4
    with pytest.raises(ValueError, match="needs TLS"):
        Connection("localhost", 25, 5, login=Login("worker", "secret"))


# --- whatever comes over the wire -----------------------------------------------------------------------------------

LINES = st.sampled_from(
    [b"250 ok", b"250-one\r\n250 two", b"550 5.1.1 no", b"451 later", b"421 bye", b"250", b"354 go on", b"450 \xff\xfe", b"503 5.5.1 order"]
)
BROKEN = st.sampled_from(
    [b"", b"what", b"2", b"2500 x", b"250-one\r\n251 two", b"\x00\x01\x02", b"199 x", b"654 x", b"250 " + b"x" * 9000, b"25\xb2 x", b"250_x"]
)


def obvious(stream: bytes) -> list[Reply | None]:
    """The replies of a stream, line by line; None at the first thing that is none. What has no end yet is left out."""
    replies: list[Reply | None] = []
    lines: list[tuple[int, str]] = []
    for raw in stream.split(b"\n")[:-1]:
        line = raw[:-1] if raw.endswith(b"\r") else raw
        code = line[:3].decode("latin-1")
        if len(line) > 8192 or code not in {str(number) for number in range(200, 600)} or line[3:4] not in (b" ", b"-", b""):
            return [*replies, None]
        lines.append((int(code), line[4:].decode("utf-8", "replace")))
        if len({number for number, _ in lines}) > 1:
            return [*replies, None]
        if line[3:4] != b"-":
            replies.append(Reply(int(code), "\n".join(text for _, text in lines)))
            lines = []
    return replies if len(stream.rpartition(b"\n")[2]) <= 8192 else [*replies, None]


def chunks(stream: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    return [stream[begin:end] for begin, end in itertools.pairwise(places)]


@given(st.lists(st.one_of(LINES, BROKEN), max_size=6), st.lists(st.integers(0, 20000), max_size=8), st.integers(0, 30))
def test_replies_are_the_same_however_they_are_cut(said: list[bytes], cuts: list[int], missing: int) -> None:
    stream = b"".join(line + b"\r\n" for line in said)
    stream = stream[: max(0, len(stream) - missing)]
    reader = ReplyReader()
    found: list[Reply | None] = []
    for chunk in chunks(stream, cuts):
        found += reader.feed(chunk)
    if reader.bad is not None:
        assert isinstance(reader.bad, BadReply)
        found.append(None)
    assert found == obvious(stream)


def expected(envelope: bytes, after_body: bytes) -> tuple[Stage, Ending]:
    """How an offer ends whose envelope and body are answered by these bytes, after which the connection is closed."""
    replies = obvious(envelope)
    for stage in (Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.BODY):
        if stage is Stage.BODY:
            replies = obvious(after_body)
        reply = replies.pop(0) if replies else Answer.LOST
        answer = reply if isinstance(reply, Answer) else Answer.NONSENSE if reply is None else answer_of(stage, reply, PERMIT)
        if answer is not Answer.TAKEN or stage is Stage.BODY:
            return stage, MEANINGS[stage, answer].ending
    raise AssertionError


@given(
    st.lists(st.one_of(st.just(b"250 ok"), st.just(b"354 go on"), LINES, BROKEN), min_size=3, max_size=3),
    st.one_of(LINES, BROKEN),
    st.lists(st.integers(0, 20000), max_size=4),
    st.sampled_from([0, 0, 0, 1, 2, 5, 12]),
)
def test_whatever_a_server_says_has_the_ending_that_the_table_names(said: list[bytes], last: bytes, cuts: list[int], missing: int) -> None:
    envelope = b"".join(line + b"\r\n" for line in said)
    after_body = last + b"\r\n"
    after_body, envelope = (after_body[: len(after_body) - missing], envelope) if missing % 2 else (after_body, envelope[: len(envelope) - missing])
    stage, ending = expected(envelope, after_body)
    bodies: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(b"220 hello\r\n")
            await reader.readline()
            writer.write(b"250-hello\r\n250 PIPELINING\r\n")
            await reader.readuntil(b"DATA\r\n")
            for chunk in chunks(envelope, cuts):
                writer.write(chunk)
                await asyncio.sleep(0)
            if stage is Stage.BODY:
                bodies.append(await body(reader))
                for chunk in chunks(after_body, cuts):
                    writer.write(chunk)
                    await asyncio.sleep(0)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    far = Far([])
    far.talk = talk  # type: ignore[method-assign]
    (offer,) = connected(far, one_message)
    assert offer.ending is ending
    assert len(bodies) == (stage is Stage.BODY)


def test_replies_are_read_with_and_without_enhanced_code() -> None:
    assert (outcome_of(550, "5.1.1 no such user").enhanced, outcome_of(550, "no such user").enhanced) == ("5.1.1", None)
    assert outcome_of(250, "1.2.3.4 is fine").enhanced is None
