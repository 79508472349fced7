"""What alerts are sent to: a real SMTP server and a real HTTP server, on loopback, that keep what they get and can be told to refuse."""

from __future__ import annotations

import json
import socketserver
import ssl
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Relay:
    """`context` makes STARTTLS possible; a `login` is then demanded. Everybody in `refused` is refused."""

    context: ssl.SSLContext | None = None
    login: tuple[str, str] | None = None
    refused: set[str] = field(default_factory=set)
    messages: list[EmailMessage] = field(default_factory=list)
    recipients: list[list[str]] = field(default_factory=list)
    encrypted: list[bool] = field(default_factory=list)
    port: int = 0


class _Smtp(socketserver.StreamRequestHandler):
    relay: Relay

    def handle(self) -> None:
        relay, secure, known, recipients = self.relay, False, self.relay.login is None, []
        self._say("220 relay.test")
        while line := self.rfile.readline().decode().rstrip():
            verb, _, rest = line.partition(" ")
            match verb.upper():
                case "EHLO":
                    words = ["relay.test", *(["STARTTLS"] if relay.context and not secure else []), *(["AUTH PLAIN"] if relay.login and secure else [])]
                    for number, word in enumerate(words, 1):
                        self._say(f"250{' ' if number == len(words) else '-'}{word}")
                case "STARTTLS":
                    assert relay.context is not None
                    self._say("220 go on")
                    self.connection = relay.context.wrap_socket(self.connection, server_side=True)
                    self.rfile, self.wfile, secure = self.connection.makefile("rb"), self.connection.makefile("wb"), True
                case "AUTH":
                    known = b64decode(rest.split()[1]).decode().split("\0")[1:] == list(relay.login or ())
                    self._say("235 welcome" if known else "535 5.7.8 who are you")
                case "MAIL":
                    self._say("250 ok" if known else "530 5.7.0 log in first")
                case "RCPT":
                    address = rest.partition("<")[2].partition(">")[0]
                    self._say("550 5.1.1 nobody" if address in relay.refused else "250 ok")
                    recipients += [] if address in relay.refused else [address]
                case "DATA":
                    self._say("354 go on")
                    body = b""
                    while (part := self.rfile.readline()) != b".\r\n":
                        body += part
                    relay.messages.append(message_from_bytes(body.replace(b"\r\n", b"\n"), policy=policy.default))  # type: ignore[arg-type]
                    relay.recipients.append(recipients)
                    relay.encrypted.append(secure)
                    self._say("250 taken")
                case "QUIT":
                    self._say("221 bye")
                    return
                case _:
                    self._say("250 ok")

    def _say(self, words: str) -> None:
        self.wfile.write(f"{words}\r\n".encode())
        self.wfile.flush()


@dataclass
class Hook:
    """`status` is what it answers."""

    status: int = 200
    texts: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def _serving(server: socketserver.BaseServer) -> Iterator[None]:
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def relaying(relay: Relay, port: int = 0) -> Iterator[Relay]:
    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True

    server = Server(("127.0.0.1", port), type("Handler", (_Smtp,), {"relay": relay}))
    relay.port = server.server_address[1]
    with _serving(server):
        yield relay


@contextmanager
def hooking(hook: Hook) -> Iterator[Hook]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if hook.status == 200:
                assert set(body) == {"text"}
                hook.texts.append(body["text"])
            self.send_response(hook.status)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            """Nothing: a test's output is not for it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hook.url = f"http://127.0.0.1:{server.server_address[1]}/services/SECRET"
    with _serving(server):
        yield hook
