"""Delivery: what the servers' logs say and what became of a campaign's messages, with the checks of the project's promises on it."""

import datetime as dt

import dagster as dg

from mail_pipelines import partitions
from mail_pipelines.assets import markdown
from mail_pipelines.assets.sending import send_batches
from mail_pipelines.campaigns import store
from mail_pipelines.database.engine import reading
from mail_pipelines.delivery import checks, plots, statistics
from mail_pipelines.dispatch import audit
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.dispatch.session import journal_of
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.server import DispatchServer

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
            **({"held": str(campaign.hold)} if campaign.hold else {}),
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


@dg.asset(
    partitions_def=partitions.servers,
    group_name="delivery",
    owners=["team:delivery"],
    kinds={"email", "matplotlib"},
    check_specs=[
        dg.AssetCheckSpec(
            "no_alarms", asset="delivery_logs", description="The mail server did nothing that it should never have to do (in cutthrough mode: queue)."
        ),
        dg.AssetCheckSpec(
            "every_line_read", asset="delivery_logs", description="No line was damaged, of an unforeseen form, of another key, or gone before it was read."
        ),
        dg.AssetCheckSpec("agrees_with_ledger", asset="delivery_logs", description="Every outcome in the log is the outcome in the ledger."),
    ],
)
def delivery_logs(context: dg.AssetExecutionContext, database: CentralDatabase, server: DispatchServer) -> dg.MaterializeResult:
    """The new lines of one dispatch server's log, held against the ledger on that server. Outcomes that came late end the doubt about their rows.

    Reading a line twice changes nothing. Lines that nobody can read are kept beside the log, in `set-aside.log`.
    """
    engine, settings = database.engine, database.settings
    audited = server.of_partition(engine, settings, context.partition_key)
    journal = journal_of(ServerFolders.of(settings.server, audited.key), audited.kind)
    found = audit.run(engine, settings, audited, journal, dt.datetime.now(dt.UTC))
    numbers = found.numbers()
    context.log.info("%s", ", ".join(f"{count:,} {name}" for name, count in numbers.items() if count) or "no new lines")
    unread = {name: numbers[name] for name in ("bad_lines", "unknown_forms", "foreign", "gaps")}
    return dg.MaterializeResult(
        metadata={
            "dagster/partition_row_count": found.lines,
            **numbers,
            "resolved_to": {state.name.lower(): count for state, count in found.resolved.items()},
            "disagreements_by_form": dict(found.disagreeing),
            "disagreeing_messages": dict(found.disagreements),
            "outcomes_per_minute": markdown.picture(plots.outcomes_per_minute(found.per_minute), "Outcomes per minute by the log"),
        },
        check_results=[
            dg.AssetCheckResult(check_name="no_alarms", passed=not found.alarms, metadata={"alarms": found.alarms}),
            dg.AssetCheckResult(check_name="every_line_read", passed=not any(unread.values()), severity=dg.AssetCheckSeverity.WARN, metadata=unread),
            dg.AssetCheckResult(check_name="agrees_with_ledger", passed=not found.disagreeing, metadata=dict(found.disagreeing)),
        ],
    )
