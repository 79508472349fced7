"""The demo's CRM as a service of its own, on the loopback.

    GET  /                  a page to look at: numbers, nobody's name
    GET  /v1/contacts       ?limit=&after=&updated_after=: {"results": [...], "paging": {"next": where the next page begins, null after the last}}
    GET  /v1/unsubscribed   likewise: who wants no more mail
    POST /v1/events/batch   {"events": [{"id", "type", "contact", "list", "reason", ...}, ...]}, with an Idempotency-Key
    GET  /v1/counts         the numbers of the page
    PUT  /v1/changing       {"changing": true}: from now on people come, change, leave and are deleted by themselves; false: no more

All but the page want the token. What belongs here: HTTP and the process. What does not: what the CRM knows and does (`crm`).
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mail_pipelines.demo.crm import Crm
from mail_pipelines.demo.people import SEED, make_person

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="2"><title>The demo's CRM</title>
<style>body {{ font: 16px sans-serif; margin: 3em }} td {{ padding: .2em 2em .2em 0 }} td + td {{ text-align: right }} h2 {{ font-size: 1em }}</style>
</head><body><h1>The demo's CRM</h1><p>It {state}. Nobody is named here.</p>{tables}</body></html>
"""


def page(counts: Mapping[str, Any], *, changing: bool) -> str:
    """The numbers as HTML."""
    parts = {
        "People": {name: counts[name] for name in ("people", "subscribed", "unsubscribed")},
        "What it was told": counts["events"] or {"nothing yet": 0},
        "What changed here": counts["changes"],
    }
    tables = "".join(
        f"<h2>{title}</h2><table>{''.join(f'<tr><td>{name}</td><td>{number:,}</td></tr>' for name, number in rows.items())}</table>"
        for title, rows in parts.items()
    )
    return _PAGE.format(state="changes twice a second" if changing else "holds still", tables=tables)


def make_server(crm: Crm, token: str) -> ThreadingHTTPServer:
    """The CRM on a free port of the loopback; `serve_forever` lets it answer."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if url.path == "/":
                self.reply(HTTPStatus.OK, page(crm.counts(), changing=crm.changing).encode(), "text/html; charset=utf-8")
                return
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            answers: dict[str, Callable[[], Any]] = {
                "/v1/contacts": lambda: crm.contacts(query),
                "/v1/unsubscribed": lambda: crm.unsubscribed(query),
                "/v1/counts": crm.counts,
            }
            self.answer(answers.get(url.path))

        def do_POST(self) -> None:
            body, key = self.body(), self.headers.get("Idempotency-Key")
            self.answer((lambda: crm.take(json.loads(body)["events"], key)) if self.path == "/v1/events/batch" else None)

        def do_PUT(self) -> None:
            body = self.body()
            self.answer((lambda: crm.let_change(bool(json.loads(body)["changing"]))) if self.path == "/v1/changing" else None)

        def body(self) -> bytes:
            # Read in any case: what is left of it would be taken for the next request.
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def answer(self, work: Callable[[], Any] | None) -> None:
            if not secrets.compare_digest(self.headers.get("Authorization") or "", f"Bearer {token}"):
                status, said = HTTPStatus.UNAUTHORIZED, {"error": "the token is wrong"}
            elif work is None:
                status, said = HTTPStatus.NOT_FOUND, {"error": "there is nothing here"}
            else:
                try:
                    status, said = HTTPStatus.OK, work()
                except (KeyError, TypeError, ValueError) as error:
                    status, said = HTTPStatus.UNPROCESSABLE_ENTITY, {"error": f"not understood ({type(error).__name__})"}
            self.reply(status, json.dumps(said).encode(), "application/json")

        def reply(self, status: HTTPStatus, content: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Queries would fill the log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("token_file", type=Path)
    parser.add_argument("address_file", type=Path, help="where to write the address when it answers")
    parser.add_argument("--people", type=int, required=True, help="how many it knows from the start")
    parser.add_argument("--strangers", type=int, required=True, help="how many others there are, who may come to it")
    parser.add_argument("--change-seconds", type=float, default=0.5, help="how often something changes")
    options = parser.parse_args()
    first, others = random.Random(SEED + 2), random.Random(SEED)
    known = range(options.strangers, options.strangers + options.people)
    crm = Crm([make_person(first, number) for number in known], (make_person(others, number) for number in range(options.strangers)))
    crm.let_change(False)
    server = make_server(crm, options.token_file.read_text(encoding="utf-8").strip())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    draft = options.address_file.with_suffix(".draft")
    draft.write_text(f"http://127.0.0.1:{server.server_port}", encoding="utf-8")
    draft.rename(options.address_file)
    while True:
        time.sleep(options.change_seconds)
        crm.change()


if __name__ == "__main__":
    main()
