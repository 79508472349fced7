"""Says to the receiving Exim whether an address is ours: it cannot compute the hash of a token itself.

A question is one line, the local part; the answer is `yes` or `no`, and the end of the connection. While the database is away it goes on with the
servers that it knows (`known_keys`), so that mail is taken. Who does not get an answer (Exim) refuses for now and lets the sender try again.

Threads that block, not asyncio: a question takes half the CPU, and forged addresses come in thousands.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.inbound.addresses import token_of
from mail_pipelines.inbound.known_keys import KnownKeys

# A question is a local part of at most 64 octets.
_QUESTION_OCTETS = 128
# Exim asks at once. So many that say nothing at the same time hold up the others for a second.
_QUESTION_SECONDS = 1.0
_THREADS = 8
_BACKLOG = 256
# `sun_path` of unix(7), with its final zero.
_PATH_OCTETS = 107
_ANSWERS = {True: b"yes", False: b"no", None: b""}


class VerifierError(MailPipelinesError):
    """The verifier cannot listen."""


def answer(question: bytes, keys: KnownKeys) -> bytes:
    """`yes` for a local part that carries a token signed with one of the keys, `no` for anything else; empty if that cannot be told now."""
    try:
        token = token_of(question.decode("ascii").rstrip("\r\n"))
    except UnicodeDecodeError:
        return b"no"
    return b"no" if token is None else _ANSWERS[keys.is_ours(token)]


@contextmanager
def listening(path: Path, keys: KnownKeys, group: int) -> Iterator[None]:
    """Answer at the Unix socket `path`, reachable for this user and `group`, as long as the block runs. Raises `VerifierError` if the path is too long."""
    if len(os.fsencode(path)) > _PATH_OCTETS:
        raise VerifierError(f"the path {path} is too long for a socket (at most {_PATH_OCTETS} bytes): set inbound.folder to a shorter one")
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o660)
        if os.geteuid() == 0:
            os.chown(path, -1, group)
        listener.listen(_BACKLOG)
        for number in range(_THREADS):
            threading.Thread(target=_serve, args=(listener, keys), name=f"verifier {number}", daemon=True).start()
        try:
            yield
        finally:
            # Ends every `accept`.
            listener.shutdown(socket.SHUT_RDWR)


def _serve(listener: socket.socket, keys: KnownKeys) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            try:
                connection.settimeout(_QUESTION_SECONDS)
                if question := _line(connection):
                    connection.sendall(answer(question, keys))
            except OSError:
                # Slow, or gone: no answer, and so none that is wrong.
                continue


def _line(connection: socket.socket) -> bytes:
    """The question; empty if it was none."""
    question = b""
    while not question.endswith(b"\n"):
        part = connection.recv(_QUESTION_OCTETS)
        question += part
        if not part or len(question) > _QUESTION_OCTETS:
            return b""
    return question
