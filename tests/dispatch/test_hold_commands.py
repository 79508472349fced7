"""`mail-pipelines hold` and `release` as an operator types them: who, why and when is kept, and shown wherever it matters."""

from __future__ import annotations

import getpass
import re
from pathlib import Path
from unittest import mock

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from mail_pipelines import cli
from mail_pipelines.campaigns.states import StateError
from mail_pipelines.commands import context
from mail_pipelines.dispatch import sending
from mail_pipelines.dispatch.holds import HoldError
from mail_pipelines.doctor import examination
from mail_pipelines.errors import MailPipelinesError
from tests.dispatch.world import World, make_world


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    context.settings.cache_clear()
    world = make_world(engine, tmp_path / "home", recipients=8)
    world.server()
    return world


def says(*words: str) -> str:
    """What a command prints, with its tables' lines taken out."""
    with mock.patch.object(context.console, "_width", 250):
        result = CliRunner().invoke(cli.app, list(words))
    if result.exception is not None:
        raise result.exception
    return re.sub(r"[ │┃]+", " ", result.output)


SCOPES = pytest.mark.parametrize(
    ("words", "what"),
    [
        ((), "everything"),
        (("--campaign", "spring"), "campaign spring"),
        (("--brand", "default"), "brand default"),
        (("--pool", "default"), "pool default"),
        (("--server", "s1"), "server s1"),
        (("--provider", "google"), "provider google"),
    ],
)


@SCOPES
def test_a_hold_from_its_beginning_to_its_end(world: World, words: tuple[str, ...], what: str) -> None:
    me = getpass.getuser()
    assert says("hold", "list") == "nothing is held\n"
    assert says("hold", *words, "--reason", "[sic] a virus in the template") == f"{what} is held\n"
    with pytest.raises(HoldError, match=f"{what} is held already"):
        says("hold", *words, "--reason", "another")
    assert f" {what} [sic] a virus in the template {me}, 20" in says("hold", "list")
    refusal = world.claim(world.server())
    assert "is held: [sic] a virus in the template" in str(refusal)
    found = [finding for finding in examination.examine() if finding.check == "holds"]
    assert [(re.sub(r" by \S+, \S+ \S+ UTC", "", finding.problem), finding.remedy) for finding in found] == [
        (f"{what} is held: [sic] a virus in the template", f"`{' '.join(('mail-pipelines release', *words))}` when that is over")
    ]
    assert says("release", *words, "--by", "Ann") == f"{what} is released\n"
    assert says("hold", "list") == "nothing is held\n"
    kept = says("hold", "list", "--all")
    assert re.search(rf" {what} \[sic\] a virus in the template {me}, \S+ \S+ UTC Ann, \S+ \S+ UTC", kept), kept
    with pytest.raises(HoldError, match=f"{what} is not held; held: nothing"):
        says("release", *words)


def test_where_holds_are_seen(world: World) -> None:
    says("hold", "--brand", "default", "--reason", "new owner", "--by", "Ann")
    words = "the brand is held: new owner (Ann, "
    assert f"spring is sending; {words}" in says("campaign", "status", "spring")
    assert words in says("campaign", "show", "spring")
    assert "sending (held)" in says("campaign", "list")
    plan = sending.plan(world.engine, "spring", 0)
    assert (plan.may_send, plan.reason) == (False, "the brand is held: new owner")
    assert "(held)" not in says("server", "list")
    says("hold", "--server", "s1", "--reason", "new disk", "--by", "Bob")
    assert "active (held)" in says("server", "list")
    assert "the server is held: new disk (Bob, " in says("server", "show", "s1")


def test_names_that_do_not_exist_are_refused(world: World) -> None:
    """A hold on a misspelt name would stop nothing."""
    for words, message in (
        (("--provider", "gogle"), "there is no provider 'gogle'; did you mean 'google'?"),
        (("--campaign", "sprin"), "there is no campaign 'sprin'; did you mean 'spring'?"),
        (("--server", "s2"), "there is no server 's2'"),
        (("--server", "s1", "--pool", "default"), "a hold is over one thing, not pool and server"),
    ):
        with pytest.raises(HoldError, match=re.escape(message)):
            says("hold", *words, "--reason", "x")
    for words in ((), ("--reason", " ")):
        with pytest.raises(HoldError, match="needs a reason"):
            says("hold", *words)
    assert says("hold", "list", "--all") == "nothing is held\n"


def test_each_hold_is_released_by_itself(world: World) -> None:
    says("hold", "--reason", "one")
    says("hold", "--campaign", "spring", "--reason", "two")
    assert says("campaign", "resume", "spring").startswith("campaign spring is sending; everything is held: one (")
    with pytest.raises(StateError, match="is sending, not paused"):
        says("campaign", "resume", "spring")
    says("hold", "--campaign", "spring", "--reason", "three")
    assert says("release") == "everything is released; still held: campaign spring\n"


def test_a_campaign_that_is_over_is_not_held(world: World) -> None:
    says("hold", "--campaign", "spring", "--reason", "one")
    says("campaign", "cancel", "spring")
    assert says("hold", "list") == "nothing is held\n"
    with pytest.raises(MailPipelinesError, match="held already or over"):
        says("hold", "--campaign", "spring", "--reason", "two")
