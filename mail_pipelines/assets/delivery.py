"""Delivery: what became of a campaign's messages, and the checks of the project's promises on it."""

import dagster as dg

from mail_pipelines import partitions
from mail_pipelines.assets import markdown
from mail_pipelines.assets.sending import send_batches
from mail_pipelines.campaigns import store
from mail_pipelines.database.engine import reading
from mail_pipelines.delivery import checks, plots, statistics
from mail_pipelines.resources.database import CentralDatabase

_SEVERITIES = {checks.Severity.WARN: dg.AssetCheckSeverity.WARN, checks.Severity.ERROR: dg.AssetCheckSeverity.ERROR}


@dg.asset(
    partitions_def=partitions.campaigns,
    deps=[dg.AssetDep(send_batches, partition_mapping=partitions.by_campaign)],
    group_name="delivery",
    owners=["team:delivery"],
    kinds={"sql", "matplotlib"},
    check_specs=[dg.AssetCheckSpec(check.name, asset="delivery_results", description=check.promise, blocking=check.blocking) for check in checks.CHECKS],
)
def delivery_results(context: dg.AssetExecutionContext, database: CentralDatabase) -> dg.MaterializeResult:
    """What became of every recipient of a campaign: totals by state, mailbox provider, server and reason, rates, speed, and checks.

    May be materialised at any time: while the campaign is sending it shows the progress.
    """
    with reading(database.engine) as connection:
        campaign = store.load(connection, context.partition_key)
        found = statistics.read(connection, campaign)
        findings = {check.name: check.find(connection, campaign) for check in checks.CHECKS}
    for name, finding in findings.items():
        context.log.info("%s %s: %s", name, "passed" if finding.passed else "failed", finding.description)
    return dg.MaterializeResult(
        metadata={
            "dagster/partition_row_count": found.totals.audience,
            "state": campaign.state.value,
            **found.numbers(),
            "excluded_by_reason": found.excluded,
            "states": markdown.picture(plots.states(found.by_state), "Recipients by state"),
            "messages_per_minute": markdown.picture(plots.messages_per_minute(found.per_minute), "Messages per minute by server"),
            "by_state": markdown.table(found.by_state),
            "by_provider": markdown.table(found.by_provider),
            "by_server": markdown.table(found.by_server),
            "by_reason": markdown.table(found.by_reason),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name=name, passed=finding.passed, severity=_SEVERITIES[finding.severity], description=finding.description, metadata=finding.numbers
            )
            for name, finding in findings.items()
        ],
    )
