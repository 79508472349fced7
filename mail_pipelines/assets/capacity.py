"""Capacity: the plan by which servers are granted messages."""

import datetime as dt

import dagster as dg

from mail_pipelines.assets import markdown
from mail_pipelines.capacity import reports
from mail_pipelines.database.engine import reading
from mail_pipelines.delivery import plots
from mail_pipelines.resources import provisioning
from mail_pipelines.resources.database import CentralDatabase


@dg.asset(group_name="capacity", owners=["team:delivery"], kinds={"sql", "highs", "matplotlib"})
def capacity_plan(context: dg.AssetExecutionContext, database: CentralDatabase) -> dg.MaterializeResult:
    """Who sends how much from which server in the next 48 hours: grants, when each campaign will be out, what holds it up, and which servers to order."""
    # The solver is loaded by this asset alone: every send run imports this module.
    from mail_pipelines.capacity import planning, sizes

    for problem in sizes.count(database.engine, database.settings):
        context.log.warning("the size of a scheduled campaign is not known: %s", problem)
    made = planning.make(database.engine, database.settings, sources=provisioning.host_sources(database.engine, database.settings))
    if made.changed is None:
        context.log.warning("another plan came into force while this one was made; it is not used")
    for failure in made.document["failures"]:
        context.log.warning("planned by the simple rule: %s", failure)
    with reading(database.engine) as connection:
        sent = planning.sent_by_hour(connection, dt.datetime.fromtimestamp(made.plan.horizon.now, dt.UTC))
    report = reports.of(made)
    return dg.MaterializeResult(
        metadata={
            "dagster/partition_row_count": made.changed or 0,
            **report.numbers,
            "campaigns": markdown.table(report.campaigns),
            "servers_missing_now": markdown.table(report.orders),
            "servers_to_order": markdown.table(report.far),
            "plan_and_reality": markdown.picture(plots.plan_and_reality(reports.hours(sent, made)), "Messages an hour, sent and planned"),
        }
    )
