"""Hosts are really installed by Ansible over SSH: what is told, what is kept, and how each failure ends."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from mail_pipelines.database.engine import transact
from mail_pipelines.provisioning import making, player, store
from mail_pipelines.provisioning.sources.inventory import Inventory
from mail_pipelines.provisioning.ssh_keys import generate, public_of
from mail_pipelines.provisioning.states import At, State, Step
from tests.parts.processes import wait_for
from tests.provisioning.world import Hoster, World

pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["sqlite"], indirect=True), pytest.mark.xdist_group("ansible")]


@pytest.fixture(autouse=True)
def _by_ansible(world: World) -> None:
    world.ansible()


def below(pattern: str) -> list[int]:
    """Processes whose command line or environment names this folder: all that a test has started has it there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if pattern.encode() in text and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


def nothing_runs(world: World) -> None:
    """No player, no Ansible, no master of SSH connections, and no folder of theirs."""
    project = str(world.place / "project")
    wait_for(lambda: not below(project), what=lambda: f"the end of {[Path(f'/proc/{pid}/cmdline').read_bytes() for pid in below(project)]}")


def test_a_host_is_installed_with_its_progress_and_no_secret_is_told_or_kept(world: World) -> None:
    before = {path.name for path in Path(player._ROOT).glob(f"{player._PREFIX}*")}
    key = world.request()
    assert world.advance(key).state is State.ACTIVE
    assert (world.place / key / "ready").read_text() == "mx1.example.com 127.0.0.1"
    (secret,) = world.keys.given
    assert (world.place / key / "token_key").read_text().strip() == secret
    # Task by task, while it goes on.
    told = [line for line in world.said if line.startswith(f"{key}: ")]
    for task in ("Folder: changed", "Token key: ok", "Careless: ok", "Ready: changed"):
        assert f"{key}: {task}" in told
    log = world.settings.home / "log" / "provisioning" / f"{key}.log"
    assert "TASK [Careless]" in log.read_text()
    # The careless task has printed it.
    assert "********" in log.read_text()
    secrets = [secret, world.hosters[0].key_file.read_text().splitlines()[2], (world.settings.home / "secrets/hosts" / key).read_text().splitlines()[2]]
    for value in secrets:
        assert all(value not in line for line in world.said)
        for path in (path for path in world.settings.home.rglob("*") if path.is_file() and "secrets" not in path.parts):
            assert value.encode() not in path.read_bytes(), path
    nothing_runs(world)
    # Others may be playing at this moment, whose folders go with the end of their plays.
    wait_for(lambda: {path.name for path in Path(player._ROOT).glob(f"{player._PREFIX}*")} <= before, seconds=60, what="the end of the play's folder")
    # A second play changes nothing, but for the password that was given anew.
    transact(world.engine, lambda connection: store.give_back(connection, key, "not wanted"))
    assert world.advance(key).state is State.RETIRED
    world.nothing_is_left(key)


def test_a_host_that_takes_our_key_no_more_is_told_and_given_back(world: World, tmp_path: Path) -> None:
    north, _ = world.hosters
    other = tmp_path / "other-key"
    other.write_text(generate())
    other.chmod(0o600)
    real = making.DO[Step.PLAY]

    def play(parts, provision, say):  # type: ignore[no-untyped-def]
        (north.folder / "hosts" / provision.key / "authorized_keys").write_text(public_of(other.read_text()))
        return real(parts, provision, say)

    _fails(world, play, "does not let us in at root@127.0.0.1", "Permission denied")


def test_another_host_in_the_place_of_ours_gets_nothing(world: World) -> None:
    """Its SSH key is not the one that we gave it: no password, no key goes there."""
    north, _ = world.hosters
    real = making.DO[Step.PLAY]

    def play(parts, provision, say):  # type: ignore[no-untyped-def]
        return real(parts, replace(provision, host=replace(provision.host, host_key=public_of(generate()))), say)

    _fails(world, play, "does not let us in", "REMOTE HOST IDENTIFICATION HAS CHANGED")
    assert not (world.place / "mx1").exists()
    assert north.created == ["mx1"]


def test_a_package_that_is_missing_fails_with_the_task_and_its_message(world: World) -> None:
    (world.place / "no-package").touch()
    _fails(world, None, "the task 'Package' failed", "non-zero return code")


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"msg": "No package matching 'x'", "stderr": "long"}, "No package matching 'x'"),
        ({"msg": "non-zero return code", "stdout": "server mx1 has no heartbeat\n", "stderr": ""}, "non-zero return code: server mx1 has no heartbeat"),
        ({"msg": "One or more items failed", "results": [{"msg": "fine"}, {"failed": True, "msg": "nothing listens"}]}, "nothing listens"),
        ({"msg": "One or more items failed", "results": [{"censored": "it is secret"}]}, "One or more items failed"),
        ({"censored": "it is secret"}, "it is secret"),
    ],
)
def test_a_task_that_failed_says_what_its_program_has_said(result: dict[str, object], words: str) -> None:
    assert player.said(result) == words


def test_a_playbook_that_is_none_is_told(world: World) -> None:
    (world.place / "project" / "server.yml").write_text("- hosts: servers\n  tasks: {\n")
    _fails(world, None, "the playbook was not played")


def test_a_play_that_takes_too_long_is_stopped_with_all_it_started(world: World) -> None:
    world.set(play_minutes=0.1)
    world.ansible()
    (world.place / "slow").touch()
    try:
        _fails(world, None, "was not done within 0.1 minutes")
    finally:
        (world.place / "slow").unlink()


def _fails(world: World, play: object, *words: str) -> None:
    world.set(attempts=1)
    key = world.request()
    with pytest.MonkeyPatch.context() as patch:
        if play is not None:
            patch.setitem(making.DO, Step.PLAY, play)
        ended = world.advance(key)
    assert (ended.state, ended.step) == (State.FAILED, Step.NONE)
    for word in words:
        assert word in (ended.reason or "")
    world.nothing_is_left(key)
    nothing_runs(world)


def test_killed_in_a_play_and_started_again_the_play_has_ended_and_the_same_host_serves(world: World, database_url: str) -> None:
    north, _ = world.hosters
    key = world.request()
    (world.place / "slow").touch()
    world.killed_at(key, database_url, world.place / "playing", "the play to be at its slow task")
    assert world.provision(key).at == At(State.PROVISIONING, Step.PLAY)
    # The player notices that its caller is gone.
    nothing_runs(world)
    (world.place / "slow").unlink()
    assert world.advance(key).state is State.ACTIVE
    assert north.created == [key]


def test_a_host_of_a_list_is_bare_again_for_the_next_server(world: World) -> None:
    north, _ = world.hosters
    world.use(Inventory("rack", [_bare(north)]))
    key = world.request()
    assert world.advance(key).state is State.ACTIVE
    assert (world.place / key).exists()
    transact(world.engine, lambda connection: store.give_back(connection, key, "not wanted"))
    assert world.advance(key).state is State.RETIRED
    assert not (world.place / key).exists()
    nothing_runs(world)


def _bare(one: Hoster):  # type: ignore[no-untyped-def]
    from mail_pipelines.provisioning.interfaces import Order

    return one.source().create(Order("bare", "", generate()))
