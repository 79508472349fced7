"""What a running server and the centre tell Prometheus is what the ledger has."""

from __future__ import annotations

import datetime as dt
import os
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from mail_pipelines.capacity import warm_up
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Claim, Delivery, State
from mail_pipelines.dispatch.claims import OpenClaim
from mail_pipelines.dispatch.holds import Kind
from mail_pipelines.dispatch.session import Session, journal_of
from tests.dispatch.world import Servers, World, make_world
from tests.metrics.test_rules import asked_of
from tests.parts.processes import free_port, listens, stop, wait_for

pytestmark = pytest.mark.server
PLAY = """
[[rule]]
domains = ["yahoo.test"]
reply_seconds = [0.0, 0.01]
refuse_percent = 100

[[rule]]
domains = ["*"]
reply_seconds = [0.0, 0.01]
"""
Labels = tuple[tuple[str, str], ...]


class Told:
    """What an endpoint said at one moment."""

    def __init__(self, port: int) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=120) as reply:
            self.text = reply.read().decode()
        families = list(text_string_to_metric_families(self.text))
        self.names = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
        self.samples: dict[str, dict[Labels, float]] = {}
        for family in families:
            for sample in family.samples:
                self.samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Values of a metric by some of its labels, where they are not zero."""
        sums: Counter[tuple[str, ...]] = Counter()
        for given, value in self.samples[f"mail_pipelines_{name}"].items():
            sums[tuple(dict(given)[label] for label in labels)] += value  # type: ignore[assignment]
        return {key: value for key, value in sums.items() if value}

    def one(self, name: str) -> float:
        (value,) = self.samples[f"mail_pipelines_{name}"].values()
        return value


def ledger(world: World) -> dict[tuple[str, str], int]:
    """Rows by provider and state."""
    with reading(world.engine) as connection:
        query = sa.select(Delivery.provider, Delivery.state, sa.func.count()).group_by(Delivery.provider, Delivery.state)
        return {(provider, State(state).name.lower()): count for provider, state, count in connection.execute(query)}


@pytest.mark.crosswise
def test_a_server_and_the_centre_tell_what_the_ledger_has(
    engine: sa.Engine, tmp_path: Path, kind: str, running: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(engine, tmp_path / "home", recipients=160, kind=kind)
    server = world.server(connections=4)
    play = tmp_path / "play.toml"
    play.write_text(PLAY, encoding="utf-8")
    ports = {"centre": free_port(), "server": free_port()}
    monkeypatch.setenv("MAIL_PIPELINES_METRICS__PORT", str(ports["centre"]))
    centre = subprocess.Popen([sys.executable, "-m", "mail_pipelines", "metrics"], env=os.environ.copy(), stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("MAIL_PIPELINES_METRICS__PORT", str(ports["server"]))
        started = running.start(world, server, play)
        wait_for(lambda: all(listens(port) for port in ports.values()), what="both endpoints")
        assert Told(ports["centre"]).by("campaign_rows", "state") == {("pending",): 160}

        # A claim that nobody works on and of which the log says nothing: the server's settler ends it.
        world.grant(server)
        transact(engine, lambda connection: warm_up.set_by_hand(connection, "s1", dt.datetime.now(dt.UTC), curve="careful", step=19))
        assert Told(ports["centre"]).by("fleet_warm_up_day_cap", "server", "provider") == {("s1", "*"): 286_862}
        transact(engine, lambda connection: warm_up.set_by_hand(connection, "s1", dt.datetime.now(dt.UTC), step=20))
        warm = Told(ports["centre"])
        assert "mail_pipelines_fleet_warm_up_day_cap" not in warm.samples
        assert warm.by("fleet_warm_up_step", "server", "provider") == {("s1", "*"): 20}
        left = world.claim(server, limit=10)
        assert isinstance(left, OpenClaim)
        wait_for(lambda: Told(ports["server"]).one("server_settled_claims_total") == 1, what="settlement")
        # The first round that settles something has then still to end.
        wait_for(lambda: "mail_pipelines_server_settled_timestamp_seconds" in Told(ports["server"]).names, what="the end of the round")
        own = Told(ports["server"])
        assert own.by("server_settled_rows_total", "state") == {("unknown",): len(left.rows)}
        assert own.by("server_info", "server", "kind") == {("s1", server.kind): 1}
        assert abs(dt.datetime.now(dt.UTC).timestamp() - own.one("server_heartbeat_timestamp_seconds")) < 60
        assert own.by("server_free_bytes", "folder").keys() == {("log",), ("run",)}
        assert ("mail_pipelines_server_queue_messages" in own.samples) == (server.kind == "exim")

        Session(engine, world.settings, server, world.campaign_id, world.campaign_key, 0, "run-1", journal_of(started.folders, server.kind)).run()
        told, rows = Told(ports["centre"]), ledger(world)
        ends = {place: count for place, count in rows.items() if place[1] != "unknown"}
        assert set(ends) == {("google", "delivered"), ("microsoft", "delivered"), ("other", "delivered"), ("yahoo", "bounced")}
        assert rows["google", "unknown"] == len(left.rows)
        assert told.by("campaign_rows", "provider", "state") == rows
        assert told.by("outcomes_total", "server", "provider", "outcome") == {("s1", *place): count for place, count in ends.items()}
        assert told.by("campaign_sending", "campaign") == {("spring",): 1}
        assert told.by("fleet_server_state", "server", "state") == {("s1", "active"): 1}
        assert told.by("fleet_unsettled_claims", "server") == {}
        assert told.one("database_reachable") == 1

        for text in (told.text, own.text):
            checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
            assert checked.returncode == 0, checked.stdout + checked.stderr
            assert "@" not in text
            assert "person" not in text
        # Everything that the rules ask about is told by one of them.
        assert asked_of() - told.names - own.names == set()

        started.kill()
        world.hold(Kind.CAMPAIGN)
        past = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)
        reopen = sa.update(Claim).where(Claim.id == left.ref.id).values(state="open", lease_until=past)
        transact(engine, lambda connection: connection.execute(reopen))
        stopped = Told(ports["centre"])
        assert stopped.by("fleet_unsettled_claims", "server") == {("s1",): 1}
        assert stopped.by("holds", "kind") == {("campaign",): 1}
        assert stopped.by("campaign_sending", "campaign") == {}
        assert stopped.by("outcomes_total", "server", "provider", "outcome") == told.by("outcomes_total", "server", "provider", "outcome")
        centre.send_signal(signal.SIGTERM)
        assert centre.wait(120) == 0
    finally:
        stop(centre)
