"""A small HTTP server for tests: what it answers is a function's, on a free port, until the block ends."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

Answer = tuple[int, dict[str, str], bytes]


@dataclass(frozen=True)
class Asked:
    """A request; `path` is as it came, without the query, and `target` with it."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    content: bytes
    target: str = ""

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def form(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(self.content.decode()).items()}


def says(status: int, document: Any, **headers: str) -> Answer:
    """An answer in JSON; a header's `_` is a hyphen."""
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, b"" if document is None else json.dumps(document).encode()


@contextmanager
def serving(answer: Callable[[Asked], Answer]) -> Iterator[str]:
    """The server's address. An answer that says that it is longer than it is breaks off there; one to HEAD has no content."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            place = urlparse(self.path)
            query = {name: values[0] for name, values in parse_qs(place.query).items()}
            content = self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.reply(*answer(Asked(self.command, place.path, query, dict(self.headers.items()), content, self.path)))

        do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = handle_any

        def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in (given := {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
                self.close_connection = self.close_connection or int(given["Content-Length"]) > len(content)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
