"""Dagster's part: who asks for servers, which runs make them, and how many runs a day that is."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import replace

import dagster as dg
import pytest
import sqlalchemy as sa

from mail_pipelines.capacity import in_force, verdicts
from mail_pipelines.capacity.verdicts import Verdict
from mail_pipelines.database import models
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.definitions import build_defs
from mail_pipelines.dispatch import audit
from mail_pipelines.dispatch.journal import Position
from mail_pipelines.provisioning import making, proposals, reserving, steps, store
from mail_pipelines.provisioning.proposals import Wanted
from mail_pipelines.provisioning.states import IN_SERVICE, State
from mail_pipelines.resources import provisioning as resource
from mail_pipelines.resources import run_tags
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.provisioning import Provisioning
from mail_pipelines.resources.queues import QUEUE_TAG, control_queue
from mail_pipelines.sensors import capacity
from tests.provisioning.world import World

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
LATE = Wanted(2, "spring is late: 900,000 recipients", "spring ends at 17:40 instead of 21:05")


@pytest.fixture
def tick(world: World, database_url: str, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dg.SensorResult]:
    """A tick of the sensor in a mode, with so many servers wanted."""
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", database_url)
    monkeypatch.setattr(resource, "parts_of", lambda engine, settings: world.parts)
    repository = build_defs().get_repository_def()

    def look(mode: str, *wanted: Wanted) -> dg.SensorResult:
        monkeypatch.setenv("MAIL_PIPELINES_PROVISIONING__MODE", mode)
        world.set(mode=mode)
        monkeypatch.setattr(Provisioning, "wanted", lambda self, engine, settings: wanted)
        with dg.build_sensor_context(instance=instance, repository_def=repository) as context:
            found = capacity.capacity_sensor(Provisioning())(context, CentralDatabase())
        assert isinstance(found, dg.SensorResult)
        return found

    return look


def asked(result: dg.SensorResult) -> list[tuple[str | None, str]]:
    return [(request.job_name, request.tags[run_tags.SERVER]) for request in result.run_requests or []]


def run(request: dg.RunRequest, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    job = build_defs().resolve_job_def(request.job_name or "")
    resources = {"database": CentralDatabase(), "provisioning": Provisioning()}
    return job.execute_in_process(run_config=request.run_config, tags=request.tags, instance=instance, resources=resources, raise_on_error=False)


def open_proposals(world: World) -> list[proposals.Proposal]:
    with reading(world.engine) as connection:
        return [one for one in proposals.all_proposals(connection) if one.state == proposals.OPEN]


def test_off_does_nothing(world: World, tick: Callable[..., dg.SensorResult]) -> None:
    assert asked(tick("off", LATE)) == []
    assert (open_proposals(world), world.all()) == ([], {})


def test_propose_writes_down_what_why_cost_and_effect_and_orders_nothing_until_somebody_does(world: World, tick: Callable[..., dg.SensorResult]) -> None:
    north, _ = world.hosters
    world.use(north.source(cost_per_hour=0.01))
    world.set(budget=100.0)
    assert asked(tick("propose", LATE)) == []
    (proposal,) = open_proposals(world)
    assert (proposal.servers, proposal.why, proposal.effect, proposal.cost_per_month) == (2, LATE.why, LATE.effect, pytest.approx(14.6))
    # Not again at every tick.
    tick("propose", LATE)
    assert open_proposals(world) == [proposal]
    transact(world.engine, lambda connection: proposals.accept(connection, world.settings.provisioning, proposal.id))
    assert asked(tick("propose")) == [("provision_server", "mx1"), ("provision_server", "mx2")]
    assert {one.proposal_id for one in world.all().values()} == {proposal.id}
    with pytest.raises(store.ProvisioningError, match="is accepted"):
        transact(world.engine, lambda connection: proposals.accept(connection, world.settings.provisioning, proposal.id))


def test_a_shortage_that_stands_is_proposed_once(world: World, tick: Callable[..., dg.SensorResult]) -> None:
    """Whenever the cool-down is over: another proposal is made when it says something else."""
    world.set(cool_down_minutes=0)
    tick("propose", LATE)
    (proposal,) = open_proposals(world)
    tick("propose", replace(LATE, effect="a few messages more by now"))
    assert open_proposals(world) == [proposal]
    tick("propose", replace(LATE, servers=3))
    (other,) = open_proposals(world)
    assert (other.id, other.servers) == (proposal.id + 1, 3)
    # At another price, too.
    world.use(world.hosters[0].source(cost_per_hour=0.02))
    tick("propose", replace(LATE, servers=3))
    (dearer,) = open_proposals(world)
    assert (dearer.id, dearer.cost_per_month) == (proposal.id + 2, pytest.approx(43.8))


def test_a_proposal_that_nobody_needs_any_more_lapses_when_its_cool_down_is_over(
    world: World, tick: Callable[..., dg.SensorResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    tick("propose", LATE)
    (proposal,) = open_proposals(world)
    tick("propose")
    assert open_proposals(world) == [proposal]
    monkeypatch.setenv("MAIL_PIPELINES_PROVISIONING__COOL_DOWN_MINUTES", "0")
    tick("propose", LATE)
    assert open_proposals(world) == [proposal]
    tick("propose", replace(LATE, pool="north"))
    (other,) = open_proposals(world)
    assert other.pool == "north"
    with pytest.raises(store.ProvisioningError, match=f"proposal {proposal.id} is lapsed"):
        transact(world.engine, lambda connection: proposals.accept(connection, world.settings.provisioning, proposal.id))
    tick("off")
    assert (open_proposals(world), world.all()) == ([], {})


def test_auto_orders_what_is_missing_and_counts_what_is_under_way(world: World, tick: Callable[..., dg.SensorResult], instance: dg.DagsterInstance) -> None:
    world.set(cool_down_minutes=0)
    result = tick("auto", LATE)
    assert asked(result) == [("provision_server", "mx1"), ("provision_server", "mx2")]
    assert [run(request, instance).success for request in result.run_requests or []] == [True, True]
    assert [one.state for one in world.all().values()] == [State.ACTIVE, State.ACTIVE]
    assert asked(tick("auto")) == []
    # Of three that are wanted one is being made.
    world.request()
    assert {key for _, key in asked(tick("auto", Wanted(3, "more")))} == {"mx3", "mx4", "mx5"}


def test_after_an_order_nothing_is_ordered_until_it_has_cooled_down(world: World, tick: Callable[..., dg.SensorResult], instance: dg.DagsterInstance) -> None:
    for request in tick("auto", LATE).run_requests or []:
        run(request, instance)
    assert asked(tick("auto", LATE)) == []
    assert len(world.all()) == 2
    long_ago = dt.datetime.now(dt.UTC) - dt.timedelta(minutes=61)
    for column in (models.Provision.requested_at, models.ProvisionProposal.made_at):
        transact(world.engine, lambda connection, column=column: connection.execute(sa.update(column.class_).values({column: long_ago})))  # type: ignore[misc]
    assert len(asked(tick("auto", LATE))) == 2


def test_a_server_that_is_being_worked_on_is_not_asked_for_again(world: World, tick: Callable[..., dg.SensorResult], instance: dg.DagsterInstance) -> None:
    key = world.request()
    job = build_defs().resolve_job_def("provision_server")
    request = capacity.run_request(world.provision(key))
    instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, tags=request.tags, run_config=request.run_config)
    assert asked(tick("propose")) == []


def test_one_that_waits_for_the_dns_is_asked_for_again_when_it_is_due(world: World, tick: Callable[..., dg.SensorResult], instance: dg.DagsterInstance) -> None:
    world.zone.quick = False
    world.set(retry_seconds=3600)
    world.request()
    (request,) = tick("off").run_requests or []
    result = run(request, instance)
    # It has done what could be done.
    assert result.success
    assert world.provision("mx1").state is State.WAITING_DNS
    assert asked(tick("off")) == []
    transact(world.engine, lambda connection: connection.execute(sa.update(models.Provision).values(due_at=dt.datetime.now(dt.UTC))))
    assert asked(tick("off")) == [("provision_server", "mx1")]
    world.zone.quick = True
    assert run(request, instance).success
    assert world.provision("mx1").state is State.ACTIVE


def test_a_run_fails_with_the_reason_when_the_server_could_not_be_made(
    world: World, tick: Callable[..., dg.SensorResult], instance: dg.DagsterInstance
) -> None:
    for one in world.hosters:
        one.trouble('{"create": [1, "the API is away"]}')
    world.request()
    (request,) = tick("propose").run_requests or []
    result = run(request, instance)
    assert not result.success
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert "the API is away" in str(failure.event_specific_data)
    # Tried again within the run, as often as the setting says.
    assert sum("create failed" in entry.user_message for entry in instance.all_logs(result.run_id)) == 2
    world.nothing_is_left("mx1")


def test_a_server_that_goes_is_taken_out_by_its_own_job(world: World, tick: Callable[..., dg.SensorResult], instance: dg.DagsterInstance) -> None:
    key = world.request()
    world.advance(key)
    transact(world.engine, lambda connection: store.give_back(connection, key, "not wanted"))
    result = tick("propose")
    assert asked(result) == [("retire_server", key)]
    assert run((result.run_requests or [])[0], instance).success
    assert world.provision(key).state is State.RETIRED
    world.nothing_is_left(key)


def test_a_server_that_is_not_needed_goes_by_itself_with_auto_alone(world: World, tick: Callable[..., dg.SensorResult], instance: dg.DagsterInstance) -> None:
    """Why it is not, and for how long it has to be so, has tests of its own."""
    key = world.request()
    world.advance(key)
    now = dt.datetime.now(dt.UTC)
    idle = Verdict(key, "default", keep=False, why="needed not within eight weeks", saves_per_month=7.3, since=now.date(), due=True)
    document = {"far": [], "orders": [], "idle": [verdicts.to_document(idle)]}
    assert transact(world.engine, lambda connection: in_force.follow(connection, 0, document, now))
    assert asked(tick("off")) == asked(tick("propose")) == []
    (request,) = tick("auto").run_requests or []
    assert (request.job_name, world.provision(key).left_why) == ("retire_server", "needed not within eight weeks")
    assert run(request, instance).success
    world.nothing_is_left(key)


def test_the_log_of_a_server_that_goes_is_audited_at_once_and_once(world: World, tick: Callable[..., dg.SensorResult], instance: dg.DagsterInstance) -> None:
    key = world.request()
    world.advance(key)
    transact(world.engine, lambda connection: store.give_back(connection, key, "not wanted"))

    def waits(connection: sa.Connection) -> None:
        server = sa.update(models.Server).where(models.Server.key == key)
        connection.execute(server.values(state="draining", health={"journal": [7, 120]}))
        connection.execute(sa.update(models.Provision).values(step="settle", due_at=dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)))

    transact(world.engine, waits)
    # Dagster has not heard of it yet.
    assert not tick("propose").run_requests
    instance.add_dynamic_partitions("servers", [key])
    (request,) = tick("propose").run_requests or []
    assert (request.job_name, request.partition_key, request.tags[QUEUE_TAG]) == ("audit_delivery_logs", key, control_queue(key))
    # The same end of the log has the same key, for which Dagster starts one run.
    assert [again.run_key for again in tick("propose").run_requests or []] == [request.run_key]

    def claims(state: str) -> None:
        now = dt.datetime.now(dt.UTC)
        row = {"id": 1, "campaign_id": 1, "shard": 0, "provider": "google", "run_id": "", "size": 1, "incarnation": "", "boot_id": "", "state": state}
        where = {"server_id": world.provision(key).server_id, "journal_inode": 7, "journal_offset": 0, "opened_at": now, "lease_until": now}
        transact(world.engine, lambda connection: connection.execute(sa.delete(models.Claim)))
        transact(world.engine, lambda connection: connection.execute(sa.insert(models.Claim).values(row | where)))

    # While something is in its hand, its log is not at its end.
    claims("open")
    assert not tick("propose").run_requests
    claims("closed")
    assert len(tick("propose").run_requests or []) == 1
    audit._save(world.engine, key, audit.Standing(position=Position(inode=7, offset=120)), dt.datetime.now(dt.UTC))
    assert not tick("propose").run_requests


@pytest.mark.parametrize("work", ["audit_delivery_logs", "send_campaign"])
def test_a_server_that_goes_keeps_its_accounts_until_its_own_runs_have_ended(
    world: World, tick: Callable[..., dg.SensorResult], instance: dg.DagsterInstance, work: str
) -> None:
    key = world.request()
    world.advance(key)
    transact(world.engine, lambda connection: store.give_back(connection, key, "not wanted"))
    transact(world.engine, lambda connection: connection.execute(sa.update(models.Provision).values(step="settle")))
    assert asked(tick("propose")) == [("retire_server", key)]
    job = build_defs().resolve_job_def(work)
    running = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, tags=run_tags.server(key))
    assert asked(tick("propose")) == []
    instance.report_run_failed(running)
    assert asked(tick("propose")) == [("retire_server", key)]


def test_a_day_of_waiting_makes_few_runs(world: World, tick: Callable[..., dg.SensorResult], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three servers are wanted all day, and nobody publishes their records before the evening. The time is simulated, the rest is real."""
    begin = dt.datetime.now(dt.UTC).replace(day=1, hour=0, minute=0)
    minute = 0
    for module in (making, store, proposals, reserving, steps, capacity):
        monkeypatch.setattr(module, "database_now", lambda connection: begin + dt.timedelta(minutes=minute))
    world.set(retry_seconds=60, at_once=2, cool_down_minutes=30)
    world.zone.quick = False
    runs = 0
    for minute in range(0, 24 * 60, 5):
        world.zone.quick = minute >= 20 * 60
        serving = sum(one.state in IN_SERVICE for one in world.all().values())
        for _, key in asked(tick("auto", Wanted(3 - serving, "spring is late"))):
            runs += 1
            world.to_the_end(key)
    assert [one.state for one in world.all().values()] == [State.ACTIVE] * 3
    assert runs < 200


def test_each_pool_has_its_own_shortage(world: World, tick: Callable[..., dg.SensorResult]) -> None:
    tick("propose", Wanted(1, "default is short"), Wanted(2, "vip is short", pool="vip"))
    assert {(one.pool, one.servers) for one in open_proposals(world)} == {(None, 1), ("vip", 2)}


def test_a_plan_counts_what_was_asked_for_before_it(world: World, tick: Callable[..., dg.SensorResult]) -> None:
    """A plan that was made with one server under way, and wants one more, gets one more; that one is not ordered a second time by the same plan."""
    world.set(cool_down_minutes=0)
    world.request()
    plan = Wanted(1, "short", as_of=dt.datetime.now(dt.UTC))
    tick("auto", plan)
    assert set(world.all()) == {"mx1", "mx2"}
    world.advance("mx2")
    tick("auto", plan)
    assert set(world.all()) == {"mx1", "mx2"}


def test_a_server_that_was_warming_is_active_when_its_warm_up_is_over(world: World, tick: Callable[..., dg.SensorResult]) -> None:
    warmed = sa.update(models.Server).values(state="warming")
    world.parts = replace(world.parts, warm_up=lambda connection, key, curve: connection.execute(warmed.where(models.Server.key == key)))
    key = world.request()
    assert world.advance(key).state is State.WARMING
    tick("propose")
    assert world.provision(key).state is State.WARMING
    transact(world.engine, lambda connection: connection.execute(sa.update(models.Server).values(state="active")))
    tick("propose")
    assert world.provision(key).state is State.ACTIVE
