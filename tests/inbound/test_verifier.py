"""The verifier says yes to what carries a token of ours, and to nothing else, quickly and whoever else holds on to it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_pipelines.inbound import verifier
from mail_pipelines.inbound.known_keys import KnownKeys
from mail_pipelines.inbound.verifier import VerifierError, answer
from mail_pipelines.messages.tokens import DeliveryToken, sign_delivery
from tests.inbound.receiving import KEY

# An installation without servers.
NOWHERE = Path("/nowhere/servers.json")
OURS = KnownKeys(KEY.encode(), dict, NOWHERE)
TOKENS = st.builds(
    lambda campaign, contact, attempt: sign_delivery(DeliveryToken(campaign, contact, attempt), KEY.encode()),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 255),
)


@given(TOKENS, st.sampled_from("bu"), st.booleans())
def test_every_token_of_ours_is_known_in_either_letter_case(token: str, purpose: str, upper: bool) -> None:
    local_part = f"{purpose}+{token}"
    assert answer((local_part.upper() if upper else local_part).encode() + b"\n", OURS) == b"yes"
    assert answer(local_part.encode() + b"\n", KnownKeys(b"another key", dict, NOWHERE)) == b"no"


@given(TOKENS, st.integers(0, 49), st.sampled_from("abcdefghijklmnopqrstuvwxyz234567+@.-"))
def test_one_changed_letter_is_enough(token: str, place: int, letter: str) -> None:
    good = f"b+{token}"
    bad = good[:place] + letter + good[place + 1 :]
    expected = b"yes" if bad == good or bad == f"u+{token}" else b"no"
    assert answer(bad.encode() + b"\n", OURS) == expected


@given(st.binary(max_size=200))
def test_anything_else_is_not_ours(question: bytes) -> None:
    assert answer(question, OURS) == b"no"


@pytest.fixture
def path() -> Iterator[Path]:
    with TemporaryDirectory(prefix="mp-") as folder:
        yield Path(folder) / "verifier"


def ask(path: Path, question: bytes) -> bytes:
    """The answer; empty if the connection ends without one."""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(120)
        connection.connect(str(path))
        connection.sendall(question)
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(10)
    return b""


@pytest.mark.slow
def test_who_says_nothing_or_too_much_gets_no_answer_and_holds_up_nobody_for_long(path: Path) -> None:
    good = f"b+{sign_delivery(DeliveryToken(1, 2, 3), KEY.encode())}\n".encode()
    path.write_text("left by an earlier process")
    with verifier.listening(path, OURS, 0):
        assert path.stat().st_mode & 0o777 == 0o660
        silent = [socket.socket(socket.AF_UNIX) for _ in range(20)]
        for connection in silent:
            connection.connect(str(path))
        assert ask(path, good) == b"yes"
        assert ask(path, b"x" * 1000) == b""
        assert ask(path, good.rstrip()) == b""
        for connection in silent:
            connection.close()
    with pytest.raises(OSError):
        ask(path, good)


def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path) -> None:
    with pytest.raises(VerifierError, match=r"set inbound\.folder to a shorter one"), verifier.listening(tmp_path / ("x" * 110), OURS, 0):
        pass
