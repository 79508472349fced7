"""A doubt from its beginning at a silent destination to the decision to send again."""

from __future__ import annotations

import datetime as dt
import email
import email.policy
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.campaigns import unknown
from mail_pipelines.commands import context
from mail_pipelines.database.models import State
from mail_pipelines.dispatch import settlement
from mail_pipelines.dispatch.claims import OpenClaim
from mail_pipelines.dispatch.session import Session, journal_of
from mail_pipelines.messages.keyring import derive
from mail_pipelines.messages.tokens import DeliveryToken, sign_delivery
from tests.dispatch.test_hold_commands import says
from tests.dispatch.world import Servers, make_world, write_play

pytestmark = pytest.mark.server


def test_evidence_is_shown_and_the_second_copy_has_the_same_message_id(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", recipients=1, kind=kind, linger_seconds=0)
    server = world.server()
    play = write_play(tmp_path / "play.toml", drop_percent=100, keeps_percent=100)
    started = running.start(world, server, play)

    def session(run_id: str) -> None:
        Session(engine, world.settings, server, world.campaign_id, world.campaign_key, 0, run_id, journal_of(started.folders, server.kind)).run()

    session("run-1")
    assert world.states() == {State.UNKNOWN: 1}
    found = unknown.evidence(engine, lambda _: world.settings, world.campaign_key, 1, dt.datetime.now(dt.UTC) + dt.timedelta(seconds=10))
    assert (found.doubt.address, found.doubt.server, found.run_id) == ("p***@google.test", "s1", "run-1")
    assert found.lines is not None
    assert any(" INTENT " in line for line in found.lines)
    assert "person1" not in str(found)
    assert [event.kind for event in found.events] == ["unknown"]
    scope = unknown.Scope(world.campaign_id, contact_id=1)
    assert unknown.decide(engine, scope, unknown.Verdict.RESEND, dt.datetime.now(dt.UTC), who="ops", why="silent", confirmed=True) == 1
    session("run-2")
    first, second = (email.message_from_bytes(message.data(), policy=email.policy.default)["Message-ID"] for message in world.kept())
    assert first == second
    world.check_counters()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_lines_about_a_message_are_in_the_log_that_its_server_shares_and_under_its_own_key(
    engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(engine, tmp_path / "home", recipients=1)
    server = world.server("s2")
    world.grant(server)
    assert isinstance(world.claim(server), OpenClaim)
    assert settlement.give_up(engine, server.id) == 1
    own_key = derive(world.settings.token_key(), "s2")
    own = world.settings.home / "servers/s2.toml"
    own.parent.mkdir()
    own.write_text(f'[server]\nexim = "s1"\n[sending]\ntoken_key = "{own_key.decode()}"\n', encoding="utf-8")
    journal = world.folders("s1").journal
    journal.parent.mkdir()
    token = sign_delivery(DeliveryToken(world.campaign_id, 1, 0), own_key)
    journal.write_text(f"2026-11-24 12:15:42.927 [23506] INTENT {token} 23506 c1.99\n2026-11-24 12:15:43.000 [23506] another line\n", encoding="ascii")
    monkeypatch.setenv("MAIL_PIPELINES_SERVER", "s1,s2")
    context.settings.cache_clear()
    assert f"INTENT {token} 23506 c1.99" in says("unknown", "show", world.campaign_key, "1")
