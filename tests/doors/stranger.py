"""Asks a host for many things at once, from another one: run inside that one's network namespace.

Standard input is JSON: the file of the certificate to trust, and a list of what to ask (`Question`). Prints the answers as JSON: a status and a body,
"nothing" where no connection came about.
"""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from websockets.exceptions import InvalidHandshake, InvalidStatus
from websockets.sync.client import connect

SECONDS = 120.0
PATIENCE = 240.0


@dataclass(frozen=True)
class Question:
    """One request over TLS; `subscription` asks for a websocket and sends that. Without a path: whether the port can be connected to at all."""

    host: str
    port: int = 443
    path: str = ""
    method: str = "GET"
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    login: tuple[str, str] | None = None
    subscription: str = ""
    # Asked again until the answer has this.
    until: str = ""


@dataclass(frozen=True)
class Answer:
    status: int | str
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)


def ask(question: Question, trusted: ssl.SSLContext) -> Answer:
    headers = dict(question.headers)
    if question.login:
        headers["Authorization"] = "Basic " + base64.b64encode(":".join(question.login).encode()).decode()
    end = time.monotonic() + PATIENCE
    while (answer := _ask(question, headers, trusted)) and question.until not in answer.body and time.monotonic() < end:
        time.sleep(0.2)
    return answer


def _ask(question: Question, headers: dict[str, str], trusted: ssl.SSLContext) -> Answer:
    try:
        if not question.path:
            socket.create_connection((question.host, question.port), timeout=SECONDS).close()
            return Answer("open")
        return _subscribe(question, headers, trusted) if question.subscription else _request(question, headers, trusted)
    except OSError as error:
        return Answer("nothing", str(error))


def _request(question: Question, headers: dict[str, str], trusted: ssl.SSLContext) -> Answer:
    connection = http.client.HTTPSConnection(question.host, question.port, timeout=SECONDS, context=trusted)
    body = None if question.body is None else json.dumps(question.body)
    connection.request(question.method, question.path, body, {"Content-Type": "application/json", **headers})
    reply = connection.getresponse()
    return Answer(reply.status, reply.read().decode(errors="replace"), {name.lower(): value for name, value in reply.headers.items()})


def _subscribe(question: Question, headers: dict[str, str], trusted: ssl.SSLContext) -> Answer:
    """The first message of the subscription, by the protocol that Dagster speaks."""
    address = f"wss://{question.host}:{question.port}{question.path}".replace(":443/", "/")
    try:
        with connect(address, ssl=trusted, additional_headers=headers, subprotocols=["graphql-ws"], open_timeout=SECONDS, proxy=None) as websocket:  # type: ignore[list-item]
            websocket.send(json.dumps({"type": "connection_init"}))
            websocket.send(json.dumps({"id": "1", "type": "start", "payload": {"query": question.subscription}}))
            while True:
                message = websocket.recv(timeout=SECONDS)
                if json.loads(message)["type"] not in ("connection_ack", "ka"):
                    return Answer(101, str(message))
    except InvalidStatus as error:
        return Answer(error.response.status_code)
    except InvalidHandshake as error:
        return Answer("nothing", str(error))


def main() -> None:
    given = json.load(sys.stdin)
    trusted = ssl.create_default_context(cafile=given["trusted"])
    questions = [Question(**question) for question in given["questions"]]
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda question: ask(question, trusted), questions))
    sys.stdout.write(json.dumps([asdict(answer) for answer in answers]))


if __name__ == "__main__":
    main()
