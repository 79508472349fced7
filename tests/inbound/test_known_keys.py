"""The receiving host knows the servers' keys: new ones at once, and those it has known while the database is away."""

from __future__ import annotations

from pathlib import Path

import pytest

from mail_pipelines.inbound import known_keys
from mail_pipelines.inbound.known_keys import KnownKeys, LookUpFailed
from mail_pipelines.inbound.verifier import answer
from mail_pipelines.messages.keyring import derive
from tests.inbound.mails import token
from tests.inbound.receiving import KEY


class Registry:
    """The servers in a database that may be away, and how often it was asked."""

    def __init__(self) -> None:
        self.servers = {"mx1"}
        self.is_away = False
        self.asked = 0

    def look_up(self) -> set[str]:
        self.asked += 1
        if self.is_away:
            raise LookUpFailed("away")
        return set(self.servers)


@pytest.fixture
def registry() -> Registry:
    return Registry()


def of(server: str) -> str:
    """A token of a server's own."""
    return token(key=derive(KEY.encode(), server).decode())


def test_tokens_of_every_registered_server_are_ours(registry: Registry, tmp_path: Path) -> None:
    keys = KnownKeys(KEY.encode(), registry.look_up, tmp_path / "servers.json")
    assert keys.is_ours(token())
    assert registry.asked == 0
    assert keys.is_ours(of("mx1"))
    assert keys.is_ours(of("mx2")) is False
    assert answer(f"u+{of('mx1')}\n".encode(), keys) == b"yes"
    assert answer(f"b+{of('mx2')}\n".encode(), keys) == b"no"


def test_forged_tokens_ask_the_database_once_in_a_while(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = KnownKeys(KEY.encode(), registry.look_up, tmp_path / "servers.json")
    assert {keys.is_ours(of(f"forged{number}")) for number in range(200)} == {False}
    assert registry.asked == 1
    registry.servers.add("mx2")
    monkeypatch.setattr(known_keys, "LOOK_UP_SECONDS", 0)
    assert keys.is_ours(of("mx2"))
    assert registry.asked == 2


def test_while_the_database_is_away_known_servers_are_known_and_nothing_is_refused_for_good(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_keys, "LOOK_UP_SECONDS", 0)
    memory = tmp_path / "servers.json"
    registry.is_away = True
    new = KnownKeys(KEY.encode(), registry.look_up, memory)
    assert (new.is_ours(token()), new.is_ours(of("mx1"))) == (True, None)
    assert answer(f"b+{of('mx1')}\n".encode(), new) == b""
    # What is no token is refused whatever the database says.
    assert answer(b"postmaster\n", new) == b"no"
    registry.is_away = False
    assert new.is_ours(of("mx1"))
    registry.is_away = True
    again = KnownKeys(KEY.encode(), registry.look_up, memory)
    assert (again.is_ours(of("mx1")), again.is_ours(of("mx2"))) == (True, None)
    registry.is_away, registry.servers = False, {"mx1", "mx2"}
    assert (again.is_ours(of("mx2")), again.is_ours(of("mx3"))) == (True, False)
    # A memory that a power loss has torn is none.
    memory.write_text('["m')
    registry.is_away = True
    assert KnownKeys(KEY.encode(), registry.look_up, memory).is_ours(of("mx1")) is None


def test_a_server_that_a_restored_database_does_not_know_is_not_forgotten(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_keys, "LOOK_UP_SECONDS", 0)
    memory = tmp_path / "servers.json"
    registry.servers = {"mx1", "mx9"}
    keys = KnownKeys(KEY.encode(), registry.look_up, memory)
    assert keys.is_ours(of("mx9"))
    # Others are registered after the restore, so that there is something to be written down.
    registry.servers = {"mx1", "mx10"}
    for known in (keys, KnownKeys(KEY.encode(), registry.look_up, memory)):
        assert known.is_ours(of("forged")) is False
        assert known.is_ours(of("mx10"))
        assert known.is_ours(of("mx9"))
