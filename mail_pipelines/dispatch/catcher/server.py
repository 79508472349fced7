"""The catcher's SMTP conversation (RFC 5321, PIPELINING): permit, INTENT, destination, DONE, in the order the real thing keeps.

Each offer goes: recipient (permit looked at, refusals) → body → INTENT line → permit looked at again → the destination's
time and answer → the message kept → DONE line → reply to the client. After the body the destination's part goes on
even if the client is gone, as an onward connection would.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from dataclasses import dataclass, field

from mail_pipelines.dispatch import permit
from mail_pipelines.dispatch.catcher import log
from mail_pipelines.dispatch.catcher.play import Ending, Play
from mail_pipelines.dispatch.catcher.store import Store
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.dispatch.journal import JournalWriter, Kind, Outcome

_MAX_LINE = 2048
_MAX_MESSAGE = 50 << 20
_PATH = re.compile(rb"(?:FROM|TO):\s*<([^<>\s]*)>", re.IGNORECASE)
_NO_SPACE = Outcome(Kind.DEFERRED, 452, "4.3.1", "no space left")
_VOID_NO_PERMIT = Outcome(Kind.VOID, 451, "4.7.0", "permit withdrawn")


@dataclass
class Catcher:
    """One running catcher: the parts its conversations share."""

    folders: ServerFolders
    play: Play
    port: int
    host: str = "127.0.0.1"
    # False: only the destinations, behind a real mail server. Then no permit is asked for, and silence is silence.
    fenced: bool = True
    conversations: set[Conversation] = field(default_factory=set)
    destinations: set[asyncio.Task[None]] = field(default_factory=set)
    stopping: bool = False
    # Set when the end of an offer could not be written down. The process then has to end, for as long as it lives
    # an INTENT without end means that the message is still at its destination.
    failure: asyncio.Event = field(default_factory=asyncio.Event)

    def has_permit(self, name: str) -> bool:
        return not self.fenced or permit.is_valid(self.folders.permits, name)

    async def start(self) -> None:
        self.folders.make()
        self.journal = JournalWriter(self.folders.journal)
        self.store = Store(self.folders.mail)
        self._counter = os.open(self.folders.run / "connections", os.O_RDWR | os.O_CREAT, 0o600)
        self.count()
        self._server = await asyncio.get_running_loop().create_server(lambda: Conversation(self), self.host, self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Take no more messages, then wait for what is at the destinations: their answers still belong into the journal."""
        self._server.close()
        self.stopping = True
        while self.destinations:
            await asyncio.wait(self.destinations)
        for conversation in list(self.conversations):
            conversation.transport.close()
        self.journal.close()
        self.store.close()
        os.close(self._counter)

    def count(self) -> None:
        """Keep the number of open connections on file, where it survives this process."""
        os.pwrite(self._counter, f"{len(self.conversations):<8}".encode(), 0)


def open_connections(folders: ServerFolders) -> int:
    """How many connections the catcher had when it last counted, even if it was killed since."""
    return int((folders.run / "connections").read_text() or 0)


class Conversation(asyncio.Protocol):
    """One client connection."""

    def __init__(self, catcher: Catcher) -> None:
        self.catcher = catcher
        self.buffer = bytearray()
        self.scanned = 0
        self.permit = ""
        self.sender: str | None = None
        self.recipient: str | None = None
        self.in_data = False
        self.busy = False

    # --- transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.peer: str = transport.get_extra_info("peername")[0]
        self.catcher.conversations.add(self)
        self.catcher.count()
        self.reply("220 catcher ESMTP")

    def connection_lost(self, error: Exception | None) -> None:
        self.catcher.conversations.discard(self)
        self.catcher.count()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self.advance()

    def reply(self, text: str) -> None:
        if not self.transport.is_closing():
            self.transport.write(text.encode("ascii", "replace") + b"\r\n")

    # --- conversation ---

    def advance(self) -> None:
        """Take what the buffer holds, one command or body at a time, while no destination is being waited for."""
        while not self.busy and not self.transport.is_closing():
            if self.in_data:
                end = self.body_end()
                if end is None:
                    return
                body = bytes(self.buffer[:end])
                del self.buffer[: end + 3]
                self.in_data = False
                self.offer(body)
                continue
            line, separator, _ = self.buffer.partition(b"\n")
            if not separator:
                if len(self.buffer) > _MAX_LINE:
                    self.reply("500 5.5.2 line too long")
                    self.transport.close()
                return
            del self.buffer[: len(line) + 1]
            self.command(bytes(line).rstrip(b"\r"))

    def body_end(self) -> int | None:
        """Where the body ends and `.CRLF` follows, or None if it is not all here."""
        if self.buffer.startswith(b".\r\n"):
            return 0
        found = self.buffer.find(b"\r\n.\r\n", self.scanned)
        if found >= 0:
            self.scanned = 0
            return found + 2
        if len(self.buffer) > _MAX_MESSAGE:
            self.reply("552 5.3.4 message too big")
            self.transport.close()
        self.scanned = max(0, len(self.buffer) - 4)
        return None

    def command(self, line: bytes) -> None:
        verb, _, argument = line.partition(b" ")
        match verb.upper():
            case b"EHLO" | b"HELO":
                self.permit = argument.decode("ascii", "replace").strip()
                self.sender = self.recipient = None
                self.catcher.journal.write(log.mark(self.permit))
                self.reply("250-catcher\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 ENHANCEDSTATUSCODES")
            case b"MAIL":
                path = _PATH.match(argument)
                if path is None:
                    self.reply("501 5.5.4 expected MAIL FROM:<address>")
                    return
                if self.sender is not None:
                    self.reply("503 5.5.1 sender already given")
                    return
                self.sender, self.recipient = path[1].decode("ascii", "replace"), None
                self.reply("250 2.1.0 Ok")
            case b"RCPT":
                self.name_recipient(argument)
            case b"DATA":
                if self.sender is None or self.recipient is None:
                    self.reply("503 5.5.1 need MAIL and RCPT first")
                    return
                self.in_data = True
                self.scanned = 0
                self.reply("354 go on")
            case b"RSET":
                self.sender = self.recipient = None
                self.reply("250 2.0.0 Ok")
            case b"NOOP":
                self.reply("250 2.0.0 Ok")
            case b"QUIT":
                self.reply("221 2.0.0 Bye")
                self.transport.close()
            case _:
                self.reply("502 5.5.2 command not known")

    def name_recipient(self, argument: bytes) -> None:
        path = _PATH.match(argument)
        if path is None or self.sender is None:
            self.reply("503 5.5.1 expected RCPT TO:<address> after MAIL")
            return
        if not self.catcher.has_permit(self.permit):
            self.reply(f"451 4.7.0 no permit {self.permit}")
            return
        recipient = path[1].decode("ascii", "replace")
        refusal = self.catcher.play.at_recipient(recipient, time.time())
        if refusal is not None:
            self.catcher.journal.write(log.done(self.token(), refusal, self.permit))
            self.reply(f"{refusal.code} {refusal.enhanced} {refusal.text}")
            return
        self.recipient = recipient
        self.reply("250 2.1.5 Ok")

    def token(self) -> str:
        """The message's token: what stands after the `+` in the envelope sender (VERP)."""
        return (self.sender or "").partition("@")[0].partition("+")[2] or "-"

    def offer(self, body: bytes) -> None:
        """Hand a body to the destination, unless the permit has been withdrawn."""
        assert self.sender is not None
        assert self.recipient is not None
        if self.catcher.stopping:
            self.reply("421 4.3.2 shutting down")
            self.transport.close()
            return
        token, sender, recipient = self.token(), self.sender, self.recipient
        # The transaction ends with its body, whatever becomes of it.
        self.sender = self.recipient = None
        journal = self.catcher.journal
        try:
            journal.write(log.intent(token, os.getpid(), self.permit))
        except OSError:
            # No INTENT on disk, no offer: a full disk refuses mail instead of losing track of it.
            self.reply(f"452 4.3.1 no space for the journal {self.permit}")
            return
        if not self.catcher.has_permit(self.permit):
            try:
                journal.write(log.done(token, _VOID_NO_PERMIT, self.permit))
            except OSError:
                self.catcher.failure.set()
            self.reply(f"451 4.7.0 permit withdrawn {self.permit}")
            return
        self.busy = True
        ending = self.catcher.play.at_body(recipient, token)
        task = asyncio.get_running_loop().create_task(self.destination(ending, token, sender, recipient, body))
        self.catcher.destinations.add(task)
        task.add_done_callback(self.catcher.destinations.discard)

    async def destination(self, ending: Ending, token: str, sender: str, recipient: str, body: bytes) -> None:
        permit = self.permit
        await asyncio.sleep(ending.seconds)
        outcome = ending.outcome
        try:
            if ending.keeps:
                if body.startswith(b"."):
                    body = body[1:]
                data = body.replace(b"\r\n..", b"\r\n.")
                if not self.catcher.store.keep(token=token, permit=permit, sender=sender, recipient=recipient, data=data, peer=self.peer):
                    outcome = _NO_SPACE
            self.catcher.journal.write(log.done(token, outcome, permit))
        except OSError:
            self.transport.abort()
            self.catcher.failure.set()
            return
        if outcome.kind is Kind.UNKNOWN and not self.catcher.fenced:
            self.transport.abort()
        elif outcome.kind is Kind.UNKNOWN:
            self.reply("450 4.4.2 Onward transmission not accepted")
        else:
            self.reply(f"{outcome.code} {outcome.enhanced} {outcome.text}")
        self.busy = False
        self.advance()
