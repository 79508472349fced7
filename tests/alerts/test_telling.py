"""Each cause is told once to each channel, again after the reminder period, and when it is over; whatever channel is away meanwhile."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from mail_pipelines.alerts import memory, telling
from mail_pipelines.alerts.cause import Cause
from mail_pipelines.alerts.channels import ChannelError, Mail, Webhook, channels_of
from mail_pipelines.alerts.memory import GONE_FOR, Alert, News
from mail_pipelines.benchmarks.certificates import contexts
from mail_pipelines.cli import app
from mail_pipelines.commands import context
from mail_pipelines.config import AlertSettings
from mail_pipelines.database.engine import reading
from tests.alerts.receivers import Hook, Relay, hooking, relaying
from tests.parts.processes import free_port

NOW = dt.datetime(2026, 11, 30, 9, 0, tzinfo=dt.UTC)
DAY, MINUTE = dt.timedelta(days=1), dt.timedelta(minutes=1)
SILENT = Cause("server-silent", "mx1", "server mx1 is silent", "mail-pipelines server show mx1")
LATE = Cause("campaign-late", "spring", "campaign spring is late", "mail-pipelines campaign show spring")
SLOW = Cause("recovery", "", "a recovery waits", "mail-pipelines recover", dt.timedelta(minutes=30))


@pytest.fixture
def relay() -> Iterator[Relay]:
    with relaying(Relay()) as relay:
        yield relay


@pytest.fixture
def hook() -> Iterator[Hook]:
    with hooking(Hook()) as hook:
        yield hook


def settings(relay: Relay, **more: object) -> AlertSettings:
    return AlertSettings.model_validate(
        {"relay_host": "127.0.0.1", "relay_port": relay.port, "from_address": "alerts@shop.test", "to": ["ops@shop.test"]} | more
    )


def alerts_of(engine: sa.Engine) -> list[Alert]:
    with reading(engine) as connection:
        return memory.load(connection)


def test_a_cause_is_told_once_by_each_channel_until_it_is_over(engine: sa.Engine, relay: Relay, hook: Hook) -> None:
    channels = channels_of(settings(relay, webhook_url=hook.url))
    for minute in range(3):
        telling.look(engine, [SILENT], channels, NOW + minute * MINUTE, DAY)
    [message] = relay.messages
    assert (message["Subject"], message["To"], relay.recipients) == ("[mail_pipelines] server mx1 is silent", "ops@shop.test", [["ops@shop.test"]])
    assert "    mail-pipelines server show mx1" in message.get_content()
    assert message["Auto-Submitted"] == "auto-generated"
    assert hook.texts == [f"[mail_pipelines] server mx1 is silent\n{message.get_content()}"]

    over = NOW + 2 * MINUTE + GONE_FOR
    assert telling.look(engine, [], channels, over - MINUTE, DAY).news == 0
    assert telling.look(engine, [], channels, over, DAY).news == 2
    assert telling.look(engine, [], channels, over + MINUTE, DAY).news == 0
    assert relay.messages[1]["Subject"] == "[mail_pipelines] resolved: server mx1 is silent"
    assert len(hook.texts) == 2

    # The same again is new again.
    assert telling.look(engine, [SILENT], channels, over + DAY, DAY).news == 2
    [alert] = alerts_of(engine)
    assert (alert.first_seen, alert.resolved_at) == (over + DAY, None)


def test_what_lasts_is_told_again_after_the_period(engine: sa.Engine, relay: Relay) -> None:
    channels = channels_of(settings(relay))
    for hour in range(50):
        telling.look(engine, [SILENT], channels, NOW + dt.timedelta(hours=hour), DAY)
    assert [message["Subject"].removeprefix("[mail_pipelines] ") for message in relay.messages] == [
        "server mx1 is silent",
        "still: server mx1 is silent",
        "still: server mx1 is silent",
    ]


def test_what_is_short_is_not_told_and_what_flickers_is_told_once(engine: sa.Engine, relay: Relay) -> None:
    channels = channels_of(settings(relay))
    telling.look(engine, [SLOW], channels, NOW, DAY)
    telling.look(engine, [], channels, NOW + 20 * MINUTE, DAY)
    assert alerts_of(engine) == []
    telling.look(engine, [SLOW, SILENT], channels, NOW + 21 * MINUTE, DAY)
    for minute in range(22, 40):
        telling.look(engine, [SLOW, SILENT] if minute % 3 else [SLOW], channels, NOW + minute * MINUTE, DAY)
    assert len(relay.messages) == 1
    telling.look(engine, [SLOW, SILENT], channels, NOW + 51 * MINUTE, DAY)
    assert [message["Subject"] for message in relay.messages[1:]] == ["[mail_pipelines] a recovery waits"]


def test_all_news_of_a_look_are_one_message(engine: sa.Engine, relay: Relay) -> None:
    many = [Cause("server-silent", f"mx{number}", f"server mx{number} is silent", "mail-pipelines server list") for number in range(60)]
    telling.look(engine, many, channels_of(settings(relay)), NOW, DAY)
    [message] = relay.messages
    assert message["Subject"].endswith("is silent (and 59 more)")
    assert message.get_content().endswith("and 10 more: mail-pipelines alert list\n")


def test_a_channel_that_is_away_is_told_later_and_the_other_not_twice(engine: sa.Engine, hook: Hook) -> None:
    port = free_port()
    given = settings(Relay(port=port), webhook_url=hook.url)
    told = telling.look(engine, [SILENT], channels_of(given), NOW, DAY)
    assert (told.news, len(hook.texts)) == (1, 1)
    assert told.errors[0].startswith(f"the relay 127.0.0.1:{port} (alerts.relay_host) did not take a message")
    again = telling.look(engine, [SILENT, LATE], channels_of(given), NOW + MINUTE, DAY)
    assert (again.errors, len(hook.texts)) == (told.errors, 2)
    with relaying(Relay(), port) as relay:
        telling.look(engine, [SILENT, LATE], channels_of(given), NOW + 2 * MINUTE, DAY)
        telling.look(engine, [SILENT, LATE], channels_of(given), NOW + 3 * MINUTE, DAY)
    [message] = relay.messages
    assert message.get_content().count("since") == 2
    assert len(hook.texts) == 2

    hook.status = 500
    resolved = telling.look(engine, [], [channel for channel in channels_of(given) if channel.name == "webhook"], NOW + DAY / 2, DAY)
    assert resolved.errors == ("the webhook at 127.0.0.1 (alerts.webhook_url) answered 500",)
    hook.status = 200
    telling.look(engine, [], [channel for channel in channels_of(given) if channel.name == "webhook"], NOW + DAY / 2 + MINUTE, DAY)
    assert hook.texts[2].startswith("[mail_pipelines] resolved: ")


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(1, 90)), max_size=40))
def test_nobody_is_told_of_an_end_without_a_beginning(steps: list[tuple[bool, bool, int]]) -> None:
    """Whatever comes and goes, and whether the channel takes it: beginning, reminders and end follow each other."""
    alerts: list[Alert] = []
    now, said = NOW, []
    for there, takes, minutes in steps:
        now += minutes * MINUTE
        alerts = memory.meet(alerts, [SLOW] if there else [], now)
        assert len(alerts) <= 1
        for alert in alerts:
            piece = alert.news_for("mail", now, dt.timedelta(hours=2))
            if piece is not None and takes:
                said.append(piece)
                alerts = [Alert(**{**alert.__dict__, "sent": {"mail": now}})]
    for before, after in zip([None, *said], said, strict=False):
        allowed = {None: {News.NEW}, News.RESOLVED: {News.NEW}}.get(before, {News.REMINDER, News.RESOLVED, News.NEW})
        assert after in allowed


# --- channels -------------------------------------------------------------------------------------------------------


def test_a_login_goes_only_over_tls(tmp_path: Path, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = contexts(tmp_path)
    login = {"user": "fleet", "password": "swordfish"}
    with pytest.raises(ChannelError, match="did not take a message") as raised:
        Mail(settings(relay, **login)).send("s", "t")
    assert "swordfish" not in str(raised.value)
    with relaying(Relay(server, ("fleet", "swordfish"))) as secure:
        with pytest.raises(ChannelError, match="certificate"):
            Mail(settings(secure, **login)).send("s", "t")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
        Mail(settings(secure, **login)).send("s", "Grüße\n")
        with pytest.raises(ChannelError, match="535"):
            Mail(settings(secure, user="fleet", password="wrong")).send("s", "t")
    assert secure.encrypted == [True]
    assert secure.messages[0].get_content() == "Grüße\n"


def test_a_relay_that_refuses_somebody_is_named(relay: Relay) -> None:
    relay.refused.add("gone@shop.test")
    with pytest.raises(ChannelError, match=r"gone@shop\.test"):
        Mail(settings(relay, to=["gone@shop.test", "ops@shop.test"])).send("s", "t")
    assert relay.recipients == [["ops@shop.test"]]
    with pytest.raises(ChannelError, match="did not take a message"):
        Mail(settings(relay, to=["gone@shop.test"])).send("s", "t")


def test_the_url_of_a_webhook_is_never_said(hook: Hook) -> None:
    hook.status = 404
    away = f"http://127.0.0.1:{free_port()}/SECRET"
    for url in (hook.url, away, "file:///etc/SECRET", "http://[SECRET"):
        with pytest.raises(ChannelError) as raised:
            Webhook(url).send("s", "t")
        assert "SECRET" not in str(raised.value)
    assert "SECRET" not in repr(Webhook(hook.url))


def test_half_a_configuration_is_an_error() -> None:
    assert channels_of(AlertSettings()) == []
    with pytest.raises(ChannelError, match=r"alerts\.from_address and alerts\.to"):
        channels_of(AlertSettings(relay_host="relay.test"))


# --- commands -------------------------------------------------------------------------------------------------------


def command(*words: str) -> Result:
    context.settings.cache_clear()
    result = CliRunner().invoke(app, ["alert", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit | ChannelError), result.exception
    return result


def test_a_test_message_goes_over_every_channel(relay: Relay, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nobody would be told" in str(command("test").exception)
    for name, value in {"RELAY_HOST": "127.0.0.1", "RELAY_PORT": str(relay.port), "FROM_ADDRESS": "a@shop.test", "TO": "ops@shop.test, boss@shop.test"}.items():
        monkeypatch.setenv(f"MAIL_PIPELINES_ALERTS__{name}", value)
    monkeypatch.setenv("MAIL_PIPELINES_ALERTS__WEBHOOK_URL", hook.url)
    assert command("test").output == "mail: taken\nwebhook: taken\n"
    assert relay.recipients == [["ops@shop.test", "boss@shop.test"]]
    hook.status = 403
    failed = command("test")
    assert failed.exit_code == 1
    assert "webhook: the webhook at 127.0.0.1 (alerts.webhook_url) answered 403" in failed.output


def test_the_list_has_what_is_and_what_was(engine: sa.Engine, database_url: str, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", database_url)
    monkeypatch.setattr(context.console, "width", 300)
    telling.look(engine, [SILENT, SLOW], channels_of(settings(relay)), NOW, DAY)
    telling.look(engine, [SLOW], channels_of(settings(relay)), NOW + 6 * MINUTE, DAY)
    shown = command("list").output
    assert "mail-pipelines server show mx1" in shown
    assert "over 2026-11-30 09:06" in shown
    assert "not yet" in shown
