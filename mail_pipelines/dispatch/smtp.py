"""One kept-open SMTP connection from a send session to its own server: MAIL, RCPT and DATA in one write, and the next message's envelope
in one write with the body before it (RFC 2920). aiosmtplib sets the connection up; what a reply means is the table in `endings`.

Two messages at most are on their way, one of them only by its envelope, so that a slow server holds up its sender and no memory. A
body is written only when every reply before it has been read and was as it should be: what is not taken by then can not arrive.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import aiosmtplib

from mail_pipelines.dispatch.endings import MEANINGS, Answer, Ending, Next, Stage, answer_of
from mail_pipelines.dispatch.replies import BadReply, Reply, ReplyReader

if TYPE_CHECKING:
    from mail_pipelines.messages.composing import Message

_QUIT_SECONDS = 2.0
# The stages before the body, each with the code by which it is usually taken.
_ENVELOPE = {Stage.MAIL: 250, Stage.RCPT: 250, Stage.DATA: 354}
_RESET = b"RSET\r\n"
# The body of nobody: what a server gets that asks for one although it has refused the recipient (RFC 2920 §3.1).
_NO_BODY = b".\r\n"


class Offer(NamedTuple):
    """How one conversation went. `reply` is set once the server has answered for the message, after its body."""

    next: Next
    ending: Ending
    reply: Reply | None = None
    # The words of an explicit refusal, at whatever stage.
    refusal: str = ""
    # Why no message could be made for this recipient, so that nothing was offered.
    unusable: str = ""


class ServerUnreachable(Exception):
    """No connection to the mail server, or it did not greet as it should."""


@dataclass(frozen=True)
class Login:
    """A user of the mail server, for AUTH. Only over TLS."""

    user: str
    password: str


class Connection:
    """A connection to the mail server at `host`:`port`; no greeting and no offer takes longer than `timeout` seconds.

    With `tls` the server must take STARTTLS with a certificate that the context trusts, and with `login` AUTH after it.
    """

    def __init__(self, host: str, port: int, timeout: float, *, tls: ssl.SSLContext | None = None, login: Login | None = None) -> None:
        if login is not None and tls is None:
            raise ValueError("a login needs TLS: without it the password would be readable on the way")
        self._place = f"{host}:{port}"
        self._client = aiosmtplib.SMTP(
            hostname=host,
            port=port,
            timeout=timeout,
            start_tls=tls is not None,
            use_tls=False,
            tls_context=tls,
            username=login.user if login else None,
            password=login.password if login else None,
            local_hostname="localhost",
        )
        self._timeout = timeout
        self._opened: _Wire | None = None
        self._permit = ""
        self._pipelining = False
        # A refusal before the body leaves the transaction open (RFC 5321 §4.1.4); the next MAIL would be out of order.
        self._transaction_open = False
        self._ahead: Message | None = None
        # How long the last offer took.
        self.seconds = math.inf

    @property
    def is_open(self) -> bool:
        return self._opened is not None

    @property
    def ahead(self) -> Message | None:
        """The message whose envelope is with the server already. If another one has to be next, the connection is of no more use."""
        return self._ahead

    async def open(self) -> None:
        try:
            await self._client.connect()
        except (TimeoutError, aiosmtplib.SMTPException, OSError, ssl.SSLError) as error:
            raise ServerUnreachable(f"{self._place}: {type(error).__name__}: {error}") from error
        self._opened = _Wire(cast(asyncio.Transport, self._client.transport))

    @property
    def _wire(self) -> _Wire:
        if self._opened is None:
            raise ServerUnreachable(f"{self._place}: not connected")
        return self._opened

    async def greet(self, permit: str) -> None:
        """Name the claim whose messages follow. Raises `ServerUnreachable` if the server does not take the greeting."""
        if permit == self._permit:
            return
        self._wire.give(self._timeout)
        try:
            self._wire.write(f"EHLO {permit}\r\n".encode("ascii"), 1)
            await self._wire.answered(1)
            reply = self._wire.reply()
        except (OSError, BadReply) as error:
            raise ServerUnreachable(f"EHLO: {type(error).__name__}: {error}") from error
        if reply.code != 250:
            raise ServerUnreachable(f"EHLO was answered {reply}")
        self._pipelining = "PIPELINING" in (line.upper() for line in reply.text.split("\n")[1:])
        self._permit = permit
        self._transaction_open = False

    async def offer(self, message: Message, following: Message | None = None, wanted: Callable[[], Awaitable[bool]] | None = None) -> Offer:
        """Offer one message, all within the time-out. `following` is the next one of the same claim: its envelope goes with this body.

        `wanted` is asked when everything before the body has been taken; if it says no, the body is not sent and the connection cut.
        """
        wire, stage = self._wire, Stage.MAIL
        begin = wire.give(self._timeout)
        try:
            if self._ahead is not message:
                await self._begin(message)
            self._ahead = None
            self._transaction_open = True
            commands = {} if self._pipelining else dict(zip(_ENVELOPE, _commands(message), strict=True))
            if not commands:
                await wire.answered(len(_ENVELOPE))
            for stage, usual in _ENVELOPE.items():
                if commands:
                    wire.write(commands[stage], 1)
                    await wire.answered(1)
                reply = wire.reply()
                if reply.code != usual and (answer := answer_of(stage, reply, self._permit)) is not Answer.TAKEN:
                    return await self._refused(stage, answer, reply)
            self._transaction_open = False
            if wanted is not None and not await wanted():
                # After a 354 there is no other way to take a message back.
                wire.abandon()
                return Offer(Next.RECONNECT, Ending.NOT_ATTEMPTED)
            if following is None or not self._pipelining:
                wire.write(_body(message.data), 1)
            else:
                wire.write(_body(message.data, *_commands(following)), 4)
                self._ahead = following
            stage = Stage.BODY
            await wire.answered(1)
            reply = wire.reply()
        except TimeoutError:
            return _without_reply(stage, Answer.SILENT)
        except OSError:
            return _without_reply(stage, Answer.LOST)
        except BadReply:
            return _without_reply(stage, Answer.NONSENSE)
        self.seconds = wire.now() - begin
        return _DELIVERED._replace(reply=reply) if reply.code == 250 else _offer(stage, answer_of(stage, reply, self._permit), reply)

    async def _begin(self, message: Message) -> None:
        """Write the envelope, after the end of a transaction that was left open."""
        if self._ahead is not None:
            raise ValueError("another message's envelope is with the server: it has to be offered, or the connection closed")
        wire, commands = self._wire, _commands(message) if self._pipelining else ()
        if self._transaction_open:
            wire.write(b"".join((_RESET, *commands)), 1 + len(commands))
            await wire.answered(1)
            if (reply := wire.reply()).code != 250:
                raise BadReply(f"RSET was answered {reply}")
        elif commands:
            wire.write(b"".join(commands), len(commands))

    async def _refused(self, stage: Stage, answer: Answer, reply: Reply) -> Offer:
        """The offer that was not taken at `stage`, after the replies to what had gone with it."""
        refused = _offer(stage, answer, reply)
        if refused.next is not Next.GO_ON or not self._pipelining:
            return refused
        try:
            for _ in list(_ENVELOPE)[list(_ENVELOPE).index(stage) + 1 :]:
                reply = self._wire.reply()
            if reply.code == 354:
                self._wire.write(_NO_BODY, 1)
                await self._wire.answered(1)
                self._wire.reply()
        except (OSError, BadReply):
            return Offer(Next.RECONNECT, refused.ending, refusal=refused.refusal)
        return refused

    async def close(self) -> None:
        """Say QUIT if the server still listens; never raises."""
        wire = self._opened
        if wire is None:
            return
        if self._ahead is None and wire.idle:
            wire.give(_QUIT_SECONDS)
            try:
                wire.write(b"QUIT\r\n", 1)
                await wire.answered(1)
                wire.reply()
            except (OSError, BadReply):
                pass
        wire.end()


def _commands(message: Message) -> tuple[bytes, bytes, bytes]:
    return f"MAIL FROM:<{message.envelope_sender}>\r\n".encode("ascii"), f"RCPT TO:<{message.recipient}>\r\n".encode("ascii"), b"DATA\r\n"


def _body(data: bytes, *after: bytes) -> bytes:
    """The message as it is sent, leading dots doubled, with the line that ends it and what follows."""
    # Twice as fast as `replace`, which makes a pass to count.
    stuffed = b"\r\n..".join(data.split(b"\r\n."))
    return b"".join((b"." if data.startswith(b".") else b"", stuffed, b".\r\n" if data.endswith(b"\r\n") else b"\r\n.\r\n", *after))


def _offer(stage: Stage, answer: Answer, reply: Reply) -> Offer:
    ending, following = MEANINGS[stage, answer]
    refusal = str(reply) if reply.code >= 400 else ""
    # Before the body it is no reply for the message: either the journal has the destination's refusal, or nothing was offered.
    answered = stage is Stage.BODY and answer not in (Answer.FENCED, Answer.NONSENSE)
    return Offer(following, ending, reply if answered else None, refusal)


_DELIVERED = Offer(Next.GO_ON, Ending.DELIVERED)


def _without_reply(stage: Stage, answer: Answer) -> Offer:
    ending, following = MEANINGS[stage, answer]
    return Offer(following, ending)


class _Wire(asyncio.Protocol):
    """Bytes out, replies in, in their order, and one time limit for what is waited for."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._reader = ReplyReader()
        self._replies: deque[Reply] = deque()
        self._outstanding = 0
        self._broken: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._wanted = 0
        self._due = math.inf
        self._timer: asyncio.TimerHandle | None = None
        transport.set_protocol(self)

    @property
    def idle(self) -> bool:
        """Whether nothing is asked that has not been answered, and the connection stands."""
        return self._broken is None and not self._outstanding and not self._replies

    def now(self) -> float:
        return self._loop.time()

    def give(self, seconds: float) -> float:
        """Let everything that is waited for from now on take so long in all; returns the present moment."""
        now = self.now()
        self._due = now + seconds
        return now

    def write(self, data: bytes, replies: int) -> None:
        """Write what will be answered by so many replies. Nothing is written, and the reason raised, if the conversation is broken."""
        if self._broken is not None:
            raise self._broken
        self._outstanding += replies
        self._transport.write(data)

    async def answered(self, replies: int) -> None:
        """Wait until so many replies are here, or none will come any more."""
        while len(self._replies) < replies and self._broken is None:
            if self._timer is None:
                self._timer = self._loop.call_at(self._due, self._look_at_time)
            self._wanted = replies
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def reply(self) -> Reply:
        """The next reply that is here. Without one raises why: `TimeoutError`, `BadReply` or another `OSError`; the conversation is over then."""
        if self._replies:
            return self._replies.popleft()
        raise self._broken or BadReply("no reply is here")

    def abandon(self) -> None:
        """Say nothing more, not even good-bye."""
        self._break(ConnectionAbortedError("given up"))

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.idle:
            self._transport.close()
        else:
            self._transport.abort()

    # --- called by the event loop ---

    def data_received(self, data: bytes) -> None:
        for reply in self._reader.feed(data):
            if self._outstanding:
                self._outstanding -= 1
                self._replies.append(reply)
            elif reply.code == 421:
                self._break(ConnectionResetError(f"the server ends the connection: {reply}"))
            else:
                self._break(BadReply(f"a reply that nothing had asked for: {reply}"))
        if self._reader.bad is not None:
            self._break(self._reader.bad)
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._break(error if isinstance(error, OSError) and not isinstance(error, TimeoutError) else ConnectionResetError("connection lost"))
        self._wake()

    def _look_at_time(self) -> None:
        # One timer for many replies: it is set anew only when it has gone off too early.
        self._timer = None
        if self._waiter is None:
            return
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._look_at_time)
            return
        self._break(TimeoutError("no reply in time"))
        self._wake()

    def _break(self, error: Exception) -> None:
        if self._broken is None:
            self._broken = error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done() and (len(self._replies) >= self._wanted or self._broken is not None):
            self._waiter.set_result(None)
