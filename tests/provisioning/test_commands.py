"""The commands of `mail-pipelines server` about servers that are made here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import Result
from typer.testing import CliRunner

from mail_pipelines.commands import context, fleet
from mail_pipelines.database.engine import transact
from mail_pipelines.provisioning import proposals
from mail_pipelines.provisioning.interfaces import ProvisioningError
from mail_pipelines.provisioning.proposals import Wanted
from mail_pipelines.provisioning.states import State
from mail_pipelines.resources import provisioning as resource
from tests.provisioning.world import World

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
Command = Callable[..., Result]


@pytest.fixture
def command(world: World, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", database_url)
    monkeypatch.setattr(resource, "parts_of", lambda engine, settings: world.parts)
    monkeypatch.setattr(context.console, "width", 300)
    context.settings.cache_clear()

    def run(*words: str) -> Result:
        return CliRunner().invoke(fleet.app, words)

    return run


def said(result: Result) -> str:
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_a_server_is_asked_for_and_listed(world: World, command: Command) -> None:
    assert "server mx1 is asked for" in said(command("provision", "--count", "2"))
    listed = said(command("provisions"))
    assert "mx2" in listed
    assert "asked for by hand" in listed
    assert world.hosters[0].created == []


def test_here_it_is_made_at_once_and_removed_with_its_host(world: World, command: Command) -> None:
    assert "mx1 is active" in said(command("provision", "--here"))
    assert world.hosters[0].hosts == ["mx1"]
    early = command("remove", "mx1")
    assert isinstance(early.exception, ProvisioningError)
    assert "is to be kept until" in str(early.exception)
    said(command("remove", "mx1", "--now", "--here"))
    assert world.provision("mx1").state is State.RETIRED
    assert "mx1" not in said(command("provisions"))
    (row,) = [line for line in said(command("provisions", "--all")).splitlines() if "mx1" in line]
    assert "retired" in row
    # Why it left is known after it is gone.
    assert "given up by hand" in row
    world.nothing_is_left("mx1")


def test_one_that_could_not_be_made_ends_with_status_1_and_the_reason(world: World, command: Command) -> None:
    for one in world.hosters:
        one.trouble('{"create": [3, "closed"]}')
    result = command("provision", "--here")
    assert result.exit_code == 1
    assert "could not be made: create: the command of north could not create (status 3): closed" in result.output
    assert "closed" in said(command("sources"))
    assert "is used again" in said(command("sources", "--use-again", "north"))
    assert "is not set aside" in said(command("sources", "--use-again", "north"))


def test_a_proposal_is_listed_and_accepted_once(world: World, command: Command) -> None:
    wanted = Wanted(2, "spring is late", "17:40 instead of 21:05")
    transact(world.engine, lambda connection: proposals.propose(connection, world.parts, wanted))
    assert "17:40 instead of 21:05" in said(command("proposals"))
    assert "server mx2 is asked for" in said(command("provision", "--proposal", "1"))
    again = command("provision", "--proposal", "1")
    assert "proposal 1 is accepted" in str(again.exception)
    assert "there is no proposal 9" in str(command("provision", "--proposal", "9").exception)


def test_without_a_source_it_is_said_where_to_name_one(world: World, command: Command) -> None:
    world.use()
    assert "hosts.toml" in str(command("provision").exception)
    assert world.all() == {}
