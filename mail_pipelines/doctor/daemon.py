"""Dagster: its storage, and by that its daemon, sensors, schedules and limits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.doctor import waiting
from mail_pipelines.doctor.finding import Finding, names
from mail_pipelines.runbook import Chapter

if TYPE_CHECKING:
    from dagster import DagsterInstance

# It beats every half minute. Dagster itself takes it for healthy for half an hour.
SILENT_SECONDS = 300.0


# The driver that Dagster's documents name.
_CONNECTOR = "mysql+mysqlconnector"


def check_storage_url(members: Mapping[str, config.Settings], environ: Mapping[str, str]) -> Iterator[Finding]:
    """A server has an account of Dagster's storage that can start nothing, and the centre a driver that is cheap and trusts our authority alone."""
    from mail_pipelines.resources import server_storage, views_dialect

    url = environ.get(server_storage.URL_VARIABLE)
    if members and url and not url.startswith(f"{views_dialect.DRIVER}:"):
        yield Finding(
            "Dagster",
            "the account of Dagster's storage here may write everything there: whoever steals this server can start any job at the centre",
            f"repeat `mail-pipelines server account {next(iter(members))}` at the centre, and put here what it says",
        )
    if not members and url and url.startswith(f"{_CONNECTOR}:"):
        yield Finding(
            "Dagster",
            f"{server_storage.URL_VARIABLE} names a driver that over TLS costs twenty times as much processor time, and trusts all authorities of this host",
            "write mysql+pymysql:// there, with ?ssl_ca=FILE alone behind the schema (docs/production.md), and restart the centre's units",
        )


def check_dagster(settings: config.Settings, *, is_centre: bool = True) -> Iterator[Finding]:
    """Dagster's storage, and at the centre its daemon, sensors and schedules, as that has them."""
    # Without the file an instance would make a new, empty storage.
    if not (settings.dagster_home / "dagster.yaml").is_file():
        return
    late = Finding("Dagster", f"Dagster's storage does not answer within {waiting.STORAGE_SECONDS:g} s", waiting.HANGS)
    yield from waiting.within(waiting.STORAGE_SECONDS, lambda: list(_look_at_dagster(settings, is_centre)), late)


def _look_at_dagster(settings: config.Settings, is_centre: bool) -> Iterator[Finding]:
    import dagster as dg

    try:
        with dg.DagsterInstance.from_config(str(settings.dagster_home)) as instance:
            if is_centre:
                yield from list(check_daemon(instance)) or check_ticks(instance)
                yield from check_instigators(instance)
                yield from check_slots(instance, settings)
    except (dg.DagsterError, sa.exc.SQLAlchemyError) as error:
        first_line = str(error).partition("\n")[0]
        yield Finding("Dagster", f"Dagster's storage cannot be used: {first_line}", f"check {settings.dagster_home / 'dagster.yaml'}")


def check_daemon(instance: DagsterInstance) -> Iterator[Finding]:
    required = {name: status.last_heartbeat for name, status in instance.get_daemon_statuses().items() if status.required}
    late = time.time() - SILENT_SECONDS
    silent = sorted(name for name, beat in required.items() if beat is None or beat.timestamp < late)
    if silent:
        parts = "" if len(silent) == len(required) else f" in part ({names(silent)})"
        yield Finding("daemon", f"Dagster's daemon is silent{parts}: no sensor, schedule or queued run starts", f"start it: {Chapter.DAEMON_DEAD.place}")


def check_ticks(instance: DagsterInstance) -> Iterator[Finding]:
    """A daemon without a code server beats, and evaluates nothing."""
    from dagster._core.definitions.run_request import InstigatorType

    running = [state for state in instance.all_instigator_state(instigator_type=InstigatorType.SENSOR) if state.is_running]
    ticks = [tick for state in running for tick in instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=1)]
    newest = max((tick.timestamp for tick in ticks), default=None)
    if newest is not None and newest < time.time() - SILENT_SECONDS:
        minutes = (time.time() - newest) / 60
        words = f"no sensor has run for {minutes:,.0f} minutes, though the daemon beats: Dagster's code server does not answer"
        yield Finding("code server", words, f"start it: {Chapter.DAEMON_DEAD.place}")


def check_instigators(instance: DagsterInstance) -> Iterator[Finding]:
    """Sensors and schedules all run unless somebody stopped them."""
    for state in instance.all_instigator_state():
        if not state.is_running:
            kind = state.instigator_type.value.lower()
            yield Finding(kind, f"the {kind} {state.name} is stopped", f"turn it on in the UI, or run `dagster {kind} start {state.name}`")


def check_slots(instance: DagsterInstance, settings: config.Settings) -> Iterator[Finding]:
    """`server.slots` is one of three limits on send runs: the other two are Dagster's, on runs of one server and on all runs. And `provisioning.at_once`."""
    from mail_pipelines.resources.queues import CAMPAIGN_TAG, QUEUE_TAG
    from mail_pipelines.resources.run_tags import MAKING
    from mail_pipelines.sensors.servers import MORE_SLOTS, SEND_POOL, most_slots

    queue = instance.get_concurrency_config().run_queue_config
    if queue is None:
        return
    place = settings.dagster_home / "dagster.yaml"
    slots, most = settings.server.slots, queue.max_concurrent_runs
    for limit in queue.tag_concurrency_limits:
        # With a mapping as its value it holds for each server; else for the one that it names.
        if limit["key"] == QUEUE_TAG and isinstance(limit.get("value"), dict) and limit["limit"] < slots:
            yield Finding(
                "slots",
                f"server.slots is {slots}, but Dagster has at most {limit['limit']} runs at once on one server",
                f"raise the limit of {QUEUE_TAG} in {place}",
            )
        if limit["key"] == MAKING and limit["limit"] < settings.provisioning.at_once:
            yield Finding(
                "slots",
                f"provisioning.at_once is {settings.provisioning.at_once}, but Dagster makes at most {limit['limit']} servers at once",
                f"raise the limit of {MAKING} in {place}",
            )
    # What `server_health` has counted; a negative number of runs means no limit.
    total = next((pool.limit for pool in instance.event_log_storage.get_pool_limits() if pool.name == SEND_POOL), 0)
    if total >= most_slots():
        yield Finding("slots", f"Dagster takes no more than the {total} send slots that the servers have now", MORE_SLOTS)
    for limit in queue.tag_concurrency_limits:
        if limit["key"] == CAMPAIGN_TAG and 0 <= limit["limit"] < total:
            yield Finding(
                "slots",
                f"the servers have {total} send slots, but Dagster gives one campaign at most {limit['limit']}",
                f"raise the limit of {CAMPAIGN_TAG} in {place}",
            )
    if 0 <= most < total:
        yield Finding("slots", f"the servers have {total} send slots, but Dagster has at most {most} runs at once", f"raise max_concurrent_runs in {place}")
