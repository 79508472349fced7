"""Benchmark: what a send run with nothing to send costs in production, and whether Dagster's storage stays bounded.

Dagster on MariaDB, its runs in a Celery worker that is warm, on this machine. References: for a run, the budget; for rows that are left after runs are
deleted by the nightly upkeep, those that the runs had written.
"""

from __future__ import annotations

import datetime as dt
import os
import statistics
from collections.abc import Sequence
from contextlib import ExitStack

import dagster as dg
import sqlalchemy as sa
from rich.console import Console

from mail_pipelines import partitions, up
from mail_pipelines.benchmarks.contract import Result, judge
from mail_pipelines.campaigns import store, yaml_form
from mail_pipelines.cluster import campaigns, hosts, running, watch
from mail_pipelines.cluster.hosts import Centre
from mail_pipelines.database.engine import transact
from mail_pipelines.demo.reporting import reported
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.jobs import send_campaign
from mail_pipelines.resources.queues import QUEUE_TAG
from mail_pipelines.supervision import Processes

SERVER = "mx1"
RECIPIENTS = 2_000
RUN_SECONDS = 0.5
# What a day may have at most, by the budget of 400 an hour.
RUNS_A_DAY = 400 * 24
_WARM_UP = 3
_WAIT_SECONDS = 120.0


def run(quick: bool, console: Console) -> list[Result]:
    """Raises `MailPipelinesError` if something does not work."""
    with running.alone(), running.folders(console) as (folder, run_folder), Processes() as processes, ExitStack() as stack:
        centre, fleet = running.start(folder, run_folder, [SERVER], processes, stack, console)
        if not quick:
            campaigns.prepare(centre.engine, centre.settings, centre.settings.home / "files", RECIPIENTS, processes.check)
            campaigns.limit(centre.engine, [SERVER], RECIPIENTS)
        address = centre.start_dagster()
        hosts.wait(processes, centre, fleet)
        key = _not_sent(centre) if quick else _sent(centre, processes, console)
        return _measure(centre, address, key, 5 if quick else 40)


def _sent(centre: Centre, processes: Processes, console: Console) -> str:
    """A campaign that is over, with its report."""
    campaigns.start(centre.engine, centre.settings, campaigns.CAMPAIGNS[1])
    key = campaigns.KEYS[1]
    watch.until_over(centre.engine, processes, console, (key,), (SERVER,))
    processes.wait_until_ready(lambda: reported(centre.settings, key), seconds=_WAIT_SECONDS, what="the report")
    return key


def _not_sent(centre: Centre) -> str:
    """A draft, which to a send run is what a campaign is that is over: nothing of it may be sent."""
    definition = yaml_form.parse(campaigns.CAMPAIGNS[1]).definition
    transact(centre.engine, lambda connection: store.create(connection, definition, dt.datetime.now(dt.UTC)))
    with dg.DagsterInstance.from_config(str(centre.settings.dagster_home)) as instance:
        instance.add_dynamic_partitions(partitions.campaigns.name or "", [definition.key])
    return definition.key


def _measure(centre: Centre, address: str, campaign: str, runs: int) -> list[Result]:
    storage = sa.create_engine(os.environ["DAGSTER_MYSQL_URL"])
    tags = {"dagster/partition": partitions.batch_key(campaign, 0), QUEUE_TAG: SERVER}
    with dg.DagsterInstance.from_config(str(centre.settings.dagster_home)) as instance:

        def empty_run() -> str:
            return _finished(centre, instance, up.launch(address, send_campaign.name, tags))

        for _ in range(_WARM_UP):
            empty_run()
        ids = [empty_run() for _ in range(runs)]
        written = _rows(storage, ids)
        seconds = [_seconds(instance, run_id) for run_id in ids]
        for run_id in ids:
            instance.delete_run(run_id)
        left = _rows(storage, ids)
    storage.dispose()
    name, in_a_day = "a send run with nothing to send, on a warm worker", written / runs * RUNS_A_DAY
    return [
        judge(f"{name}, median of {runs}", statistics.median(seconds), "s", RUN_SECONDS, target=1, better="lower"),
        judge(f"{name}, the longest", max(seconds), "s", RUN_SECONDS, target=2, better="lower"),
        judge(f"rows that {RUNS_A_DAY:,} of them write into Dagster's storage", in_a_day, "rows", RUNS_A_DAY, target=100, better="lower"),
        judge(f"of those of {runs} runs, left after the runs are deleted", left, "rows", written, target=0, better="lower"),
    ]


def _finished(centre: Centre, instance: dg.DagsterInstance, run_id: str) -> str:
    def over() -> bool:
        run = instance.get_run_by_id(run_id)
        return run is not None and run.is_finished

    centre.processes.wait_until_ready(over, seconds=_WAIT_SECONDS, what=f"run {run_id}")
    run = instance.get_run_by_id(run_id)
    if run is None or run.status is not dg.DagsterRunStatus.SUCCESS:
        raise MailPipelinesError(f"run {run_id} has not succeeded; its log is in Dagster's storage")
    return run_id


def _seconds(instance: dg.DagsterInstance, run_id: str) -> float:
    """From the launch to the end of a run: as long as it takes a slot."""
    told = instance.get_run_stats(run_id)
    assert told.launch_time is not None
    assert told.end_time is not None
    return told.end_time - told.launch_time


def _rows(storage: sa.Engine, runs: Sequence[str]) -> int:
    """Rows of these runs in all tables of Dagster that name a run."""
    inspector = sa.inspect(storage)
    tables = [name for name in inspector.get_table_names() if any(column["name"] == "run_id" for column in inspector.get_columns(name))]
    with storage.connect() as connection:
        run_id = sa.column("run_id", sa.String)
        return sum(connection.execute(sa.select(sa.func.count()).select_from(sa.table(name)).where(run_id.in_(runs))).scalar_one() for name in tables)
