"""The audit as Dagster runs it: by the hour, where there is something new, on the server it is about."""

from __future__ import annotations

import datetime as dt
import os

import dagster as dg
import pytest
import sqlalchemy as sa

from mail_pipelines import partitions
from mail_pipelines.assets.delivery import delivery_logs
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Delivery, State
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.files import DispatchError
from mail_pipelines.messages.tokens import DeliveryToken, sign_delivery
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.queues import QUEUE_TAG
from mail_pipelines.resources.server import DispatchServer
from mail_pipelines.schedules import due_audits
from tests.dispatch.world import World


def audit(instance: dg.DagsterInstance) -> tuple[dict[str, object], dict[str, bool]]:
    result = dg.materialize([delivery_logs], partition_key="s1", instance=instance, resources={"database": CentralDatabase(), "server": DispatchServer()})
    (event,) = result.asset_materializations_for_node("delivery_logs")
    return {name: value.value for name, value in event.metadata.items()}, {check.check_name: check.passed for check in result.get_asset_check_evaluations()}


def due(instance: dg.DagsterInstance) -> list[dg.RunRequest]:
    with dg.build_schedule_context(instance=instance, scheduled_execution_time=dt.datetime(2026, 3, 2, 9, 20, tzinfo=dt.UTC)) as context:
        found = due_audits(context, CentralDatabase())
    return [] if isinstance(found, dg.SkipReason) else found


@pytest.fixture
def token(world: World, instance: dg.DagsterInstance) -> str:
    """A server with an empty log, and the token of a delivered row."""
    world.kind = "exim"
    world.server()
    instance.add_dynamic_partitions(partitions.servers.name or "", ["s1"])
    transact(world.engine, lambda connection: connection.execute(sa.update(Delivery).where(Delivery.contact_id == 1).values(state=int(State.DELIVERED))))
    world.folders("s1").journal.touch()
    return sign_delivery(DeliveryToken(world.campaign_id, 1, 0), world.settings.token_key())


def test_only_a_speaking_server_with_new_lines_is_audited_once(world: World, instance: dg.DagsterInstance, token: str) -> None:
    heart = servers.Heartbeat(world.engine, "s1", world.folders("s1"), world.settings.server.heartbeat_seconds)
    heart.start()
    assert due(instance) == []
    world.folders("s1").journal.write_text("2026-11-24 12:15:42 exim 4.96 daemon started: pid=7, no queue runs\n" * 2)
    heart.start()
    (request,) = due(instance)
    assert (request.partition_key, request.run_key, request.tags[QUEUE_TAG]) == ("s1", "s1:2026-03-02T09", "s1-ctl")
    transact(world.engine, lambda connection: connection.execute(sa.text("UPDATE servers SET heartbeat_at = '2026-01-01'")))
    assert due(instance) == []


def test_numbers_pictures_and_checks(world: World, instance: dg.DagsterInstance, token: str) -> None:
    journal = world.folders("s1").journal
    ordinary = f'2026-11-24 12:15:42 1xVpQB-0005at-08 >> a@x.test F=<b+{token}@b.test> R=r T=t C="250 2.0.0 Ok"\n'
    journal.write_text(ordinary + "2026-11-24 12:15:43 1xVpQB-0005at-08 Completed\n")
    os.utime(journal, (0, 0))  # nothing will be added to its last record
    metadata, checks = audit(instance)
    assert checks == {"no_alarms": True, "every_line_read": True, "agrees_with_ledger": True}
    assert (metadata["lines"], metadata["delivered"], metadata["disagreements"]) == (2, 1, 0)
    assert str(metadata["outcomes_per_minute"]).startswith("![Outcomes per minute by the log](data:image/png;base64,")
    other = sign_delivery(DeliveryToken(world.campaign_id, 2, 0), world.settings.token_key())
    with journal.open("a") as file:
        file.write(ordinary.replace(token, other) + "damaged person2@microsoft.test\n" + ordinary.replace(">>", "=>") * 2)
    metadata, checks = audit(instance)
    assert checks == {"no_alarms": False, "every_line_read": False, "agrees_with_ledger": False}
    assert metadata["disagreeing_messages"] == {"delivered in the log, pending in the ledger": ["1/2/0"]}
    assert "person" not in str(metadata)


def test_the_audit_of_a_server_elsewhere_is_refused(world: World, instance: dg.DagsterInstance, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAIL_PIPELINES_SERVER", "s2")
    with pytest.raises(DispatchError, match="this worker speaks for s2"):
        audit(instance)
    monkeypatch.delenv("MAIL_PIPELINES_SERVER")
    world.folders("s1").journal.unlink()
    with pytest.raises(DispatchError, match="no journal on this host"):
        audit(instance)
