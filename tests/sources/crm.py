"""A small CRM over HTTP: pages by cursor, a token, and everything that such a server may do wrong, on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

TOKEN = "crm-token-that-no-log-shows"
Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Crm:
    """`contacts` are served in pages of `page_size`, those changed since `updated_after` if that is asked. `before` may answer in the CRM's place."""

    contacts: list[dict[str, Any]]
    page_size: int = 50
    token: str = TOKEN
    before: Callable[[int, dict[str, str]], Answer | None] | None = None
    requests: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    def answer(self, query: dict[str, str], login: str | None) -> Answer:
        self.requests.append(query)
        if self.before and (given := self.before(len(self.requests), query)) is not None:
            return given
        if login != f"Bearer {self.token}":
            return 401, {}, b'{"error": "token"}'
        chosen = [row for row in self.contacts if "updated_after" not in query or row["updated_at"] >= query["updated_after"]]
        start = int(query.get("after", "0"))
        page = chosen[start : start + self.page_size]
        following = start + self.page_size
        return 200, {}, body(page, str(following) if following < len(chosen) else None)


def body(page: list[dict[str, Any]], following: str | None) -> bytes:
    return json.dumps({"data": page, "paging": {"next": following}}).encode()


@contextmanager
def serving(crm: Crm) -> Iterator[Crm]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = {name: values[0] for name, values in parse_qs(urlparse(self.path).query).items()}
            status, headers, content = crm.answer(query, self.headers.get("Authorization"))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    crm.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield crm
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def person(number: int, changed: str = "2026-01-01T00:00:00Z", **more: Any) -> dict[str, Any]:
    return {"id": number, "properties": {"mail": f"p{number}@example.test", "name": f"P {number}", "age": number}, "updated_at": changed} | more
