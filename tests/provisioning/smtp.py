"""An SMTP server that says what a test wants it to."""

from __future__ import annotations

import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Says:
    """`before` and `after` are the extensions offered before and after STARTTLS, which `context` makes possible."""

    greeting: str = "220 mx.test ESMTP"
    ehlo: int = 250
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    context: ssl.SSLContext | None = None


@contextmanager
def saying(says: Says) -> Iterator[int]:
    """The port of a server on loopback."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            connection, extensions = self.request, says.before
            connection.sendall(f"{says.greeting}\r\n".encode())
            while line := self._line(connection):
                verb = line.split()[0].upper()
                if verb == b"EHLO":
                    lines = ["mx.test", *extensions]
                    text = "".join(f"{says.ehlo}{' ' if number == len(lines) else '-'}{word}\r\n" for number, word in enumerate(lines, 1))
                    connection.sendall(text.encode())
                elif verb == b"STARTTLS" and says.context is not None:
                    connection.sendall(b"220 go on\r\n")
                    try:
                        connection, extensions = says.context.wrap_socket(connection, server_side=True), says.after
                    except ssl.SSLError:
                        return
                else:
                    connection.sendall(b"221 bye\r\n" if verb == b"QUIT" else b"500 what\r\n")

        def _line(self, connection: ssl.SSLSocket) -> bytes:
            line = b""
            try:
                while not line.endswith(b"\n"):
                    part = connection.recv(1)
                    if not part:
                        return b""
                    line += part
            except OSError:
                return b""
            return line

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
