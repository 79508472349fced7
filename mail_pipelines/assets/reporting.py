"""Reporting: how recipients reacted to a campaign."""

import dagster as dg

from mail_pipelines import partitions
from mail_pipelines.assets import markdown
from mail_pipelines.assets.delivery import delivery_results
from mail_pipelines.campaigns import store
from mail_pipelines.database.engine import reading
from mail_pipelines.delivery import engagement, plots
from mail_pipelines.resources.database import CentralDatabase


@dg.asset(
    partitions_def=partitions.campaigns,
    deps=[delivery_results],
    group_name="reporting",
    owners=["team:reporting"],
    kinds={"sql", "matplotlib"},
)
def campaign_statistics(context: dg.AssetExecutionContext, database: CentralDatabase) -> dg.MaterializeResult:
    """Opens, clicks, unsubscribes and complaints of a campaign, over time and by link. Events of machines are counted apart."""
    with reading(database.engine) as connection:
        found = engagement.read(connection, store.load(connection, context.partition_key))
    return dg.MaterializeResult(
        metadata={
            **found.numbers(),
            "opens_and_clicks": markdown.picture(plots.engagement(found.hourly), "Opens and clicks over time"),
            "unsubscribes_and_complaints": markdown.picture(plots.refusals(found.hourly), "Unsubscribes and complaints over time"),
            "by_hour": markdown.table(found.hourly),
            "top_links": markdown.table(found.links),
        }
    )
