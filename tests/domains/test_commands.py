"""`mail-pipelines domain …` as an operator types it, and `campaign start`, which asks the DNS first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from mail_pipelines.campaigns import scheduling, versions
from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.campaigns.check import CheckFailed, check
from mail_pipelines.campaigns.states import StateError
from mail_pipelines.cli import app
from mail_pipelines.commands import context
from mail_pipelines.config import Settings
from mail_pipelines.database import models
from mail_pipelines.database.engine import transact
from mail_pipelines.dispatch import servers
from mail_pipelines.domains import rotation
from mail_pipelines.domains.domain import SendingDomain
from mail_pipelines.messages.content import Content
from tests.campaigns.parts import load, make_campaign, make_people
from tests.domains.conftest import NOW, impatient, publish
from tests.parts.dns import Zone

CONTENT = Content(subject="Hello", from_address="news@shop.example", body='<p><a href="{{ unsubscribe_url }}">Leave</a></p>')


@pytest.fixture(autouse=True)
def _fresh_settings(settings: Settings) -> None:
    context.settings.cache_clear()


def command(*words: str) -> Result:
    return CliRunner().invoke(app, ["domain", *words])


def says(*words: str) -> str:
    result = command(*words)
    assert result.exception is None, result.exception
    return result.output


def test_from_adding_a_domain_to_its_second_key(engine: sa.Engine, zone: Zone) -> None:
    zone_file = [line for line in says("add", "shop.example", "--tracking", "go.shop.example").splitlines() if " IN " in line]
    assert len(zone_file) == 5
    assert "never checked" in says("list")
    result = command("check", "shop.example")
    assert result.exit_code == 1
    assert "not usable: DKIM, DMARC" in result.output
    zone.publish(*zone_file)
    checked = says("check", "shop.example")
    assert checked.count("published") == 6
    assert "campaigns may start (2" in checked
    assert "; last check: campaigns may start (2" in says("show", "shop.example")
    shown = says("show", "shop.example")
    assert [line for line in shown.splitlines() if " IN " in line] == zone_file
    made = says("rotate", "shop.example")
    zone.publish(next(line for line in made.splitlines() if " IN " in line))
    assert "leave the record of mp" in says("rotate", "shop.example")
    assert "its record may go after" in says("show", "shop.example")
    servers.register(engine, "s1", kind="catcher", host="127.0.0.1", port=25, now=NOW)
    assert "_domainkey" in says("rotate", "shop.example", "--server", "s1")
    assert "for server s1" in says("show", "shop.example")
    assert isinstance(command("rotate", "shop.example", "--server", "s1").exception, rotation.NotPublished)
    assert "is signed with" in says("rotate", "shop.example", "--server", "s1", "--allow-unverified")


# --- campaigns --------------------------------------------------------------------------------------------------


@pytest.fixture
def campaign(engine: sa.Engine, settings: Settings) -> Campaign:
    make_people(engine, settings, 3)
    made = make_campaign(engine)
    versions.set_content(engine, made.key, CONTENT, NOW)
    return made


@pytest.mark.usefixtures("campaign")
def test_a_campaign_from_an_unknown_domain_is_refused_unless_allowed(engine: sa.Engine, settings: Settings) -> None:
    with pytest.raises(CheckFailed, match=r"shop\.example is no sending domain; .*`mail-pipelines domain add shop\.example`"):
        scheduling.start(engine, settings, "spring-sale", NOW)
    assert load(engine).state == "draft"
    refused = CliRunner().invoke(app, ["campaign", "start", "spring-sale"])
    assert isinstance(refused.exception, CheckFailed)
    assert CliRunner().invoke(app, ["campaign", "check", "spring-sale"]).exit_code == 1
    assert CliRunner().invoke(app, ["campaign", "check", "spring-sale", "--allow-unverified"]).exit_code == 0
    assert CliRunner().invoke(app, ["campaign", "start", "spring-sale", "--allow-unverified"]).exit_code == 0
    assert load(engine).state == "scheduled"
    # Bringing it forward is a start as well.
    with pytest.raises(CheckFailed, match="is no sending domain"):
        scheduling.start(engine, settings, "spring-sale", NOW)


@pytest.mark.usefixtures("campaign")
@pytest.mark.slow
def test_a_campaign_starts_when_key_and_policy_are_published(engine: sa.Engine, settings: Settings, zone: Zone, domain: SendingDomain) -> None:
    problems = check(engine, settings, "spring-sale", NOW)
    assert [problem.part for problem in problems] == ["content.from_address"] * 2
    assert "expected v=DKIM1; k=rsa; p=" in problems[0].message
    assert "expected v=DMARC1" in problems[1].message
    publish(zone, domain)
    # What no provider insists on does not hold a campaign up.
    for name, kind in (("bounces.shop.example", "MX"), ("bounces.shop.example", "TXT"), ("links.shop.example", "CNAME")):
        zone.withdraw(name, kind)
    zone.silent.add("_dmarc.shop.example")
    with pytest.raises(CheckFailed, match=r"DMARC: .* no answer within 1 s; try again"):
        scheduling.start(engine, impatient(settings), "spring-sale", NOW)
    zone.silent.clear()
    assert scheduling.start(engine, settings, "spring-sale", NOW).state == "scheduled"


def test_a_running_campaign_keeps_the_from_domain_it_was_checked_for(engine: sa.Engine, campaign: Campaign) -> None:
    transact(engine, lambda connection: connection.execute(sa.update(models.Campaign).values(state="sending")))
    versions.set_content(engine, campaign.key, replace(CONTENT, from_address="offers@shop.example"), NOW, confirmed=True)
    with pytest.raises(StateError, match=r"its From domain stays shop\.example"):
        versions.set_content(engine, campaign.key, replace(CONTENT, from_address="news@other.example"), NOW, confirmed=True)
