"""A broker on another host than the centre: its management API is asked by TLS, and gets no password before it is known."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from mail_pipelines import config
from mail_pipelines.benchmarks import certificates
from mail_pipelines.resources.broker_accounts import BrokerAccountError, BrokerAccounts


@contextmanager
def management_api(folder: Path, tags: list[str]) -> Iterator[tuple[int, list[str]]]:
    """As RabbitMQ's, for an account with these tags; its port, and the logins that it was shown. Its certificate stays in the folder."""
    shown: list[str] = []

    class Api(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(base64.b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode())
            body = json.dumps({"name": "centre-accounts", "tags": tags}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    context, _ = certificates.contexts(folder)
    with HTTPServer(("127.0.0.1", 0), Api) as server:
        # Each handshake is its own connection's: one that fails is not the server's end.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port, shown
        server.shutdown()
        thread.join()


def accounts(port: int, authority: str) -> BrokerAccounts:
    url = f"https://centre-accounts:p%40ss%2Fword@localhost:{port}"
    return BrokerAccounts(config.BrokerSettings(url="amqps://centre:word@localhost:5671/mail", management_url=url, ca=authority))


def test_its_certificate_is_verified_before_it_is_told_the_password(tmp_path: Path) -> None:
    with management_api(tmp_path, ["administrator"]) as (port, shown):
        with pytest.raises(BrokerAccountError, match="certificate verify failed"):
            accounts(port, "").check()
        assert shown == []
        accounts(port, str(tmp_path / "certificate.pem")).check()
        assert shown == ["centre-accounts:p@ss/word"]


def test_an_account_that_may_only_look_is_told_apart(tmp_path: Path) -> None:
    with (
        management_api(tmp_path, ["monitoring"]) as (port, _),
        pytest.raises(BrokerAccountError, match="rabbitmqctl set_user_tags centre-accounts administrator"),
    ):
        accounts(port, str(tmp_path / "certificate.pem")).check()


def test_an_authority_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(BrokerAccountError, match=r"No such file or directory.*broker\.ca"):
        accounts(1, str(tmp_path / "none.pem")).check()
