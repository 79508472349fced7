"""Mail that came back is read by a run, when there is any."""

from __future__ import annotations

import dagster as dg
import pytest

from mail_pipelines.definitions import build_defs
from mail_pipelines.inbound import maildir
from mail_pipelines.inbound.folders import InboundFolders
from mail_pipelines.ops.inbound import read_inbound_mail
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.sensors.inbound import inbound_mail
from tests.dispatch.world import World
from tests.inbound.mails import dsn, token
from tests.orchestration.test_sensors import context

DATABASE = CentralDatabase()


def tick(instance: dg.DagsterInstance) -> dg.RunRequest | dg.SkipReason:
    return inbound_mail(context(instance, build_defs().get_repository_def()), DATABASE)


def test_mail_is_read_by_one_run_which_tells_how_many_and_not_whose(world: World, instance: dg.DagsterInstance) -> None:
    assert isinstance(tick(instance), dg.SkipReason)
    folder = InboundFolders.of(world.settings.inbound).mail / "bounces"
    maildir.put(folder, "1", dsn(token(1, campaign_id=world.campaign_id, key="a key for tests")))
    asked = tick(instance)
    assert isinstance(asked, dg.RunRequest)
    assert asked.run_key
    assert asked.run_key.startswith("inbound:60:")
    run = instance.create_run_for_job(read_inbound_mail, status=dg.DagsterRunStatus.STARTED)
    assert isinstance(tick(instance), dg.SkipReason)
    instance.report_run_failed(run)
    result = build_defs().resolve_job_def("read_inbound_mail").execute_in_process(instance=instance, resources={"database": DATABASE})
    assert result.success
    (output,) = [event.step_output_data for event in result.all_node_events if event.is_successful_output]
    assert {name: value.value for name, value in output.metadata.items()} == {"bounce_report": 1}
    said = " ".join(record.user_message for record in instance.all_logs(result.run_id))
    assert "@" not in said
    assert isinstance(tick(instance), dg.SkipReason)


def test_a_mailbox_is_polled_every_five_minutes(world: World, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAIL_PIPELINES_INBOUND__IMAP_URL", "imaps://me@imap.example.net")
    asked = tick(instance)
    assert isinstance(asked, dg.RunRequest)
    assert asked.run_key
    assert asked.run_key.startswith("inbound:300:")
