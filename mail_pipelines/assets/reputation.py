"""Reputation: what mailbox providers tell of our domains and addresses, one asset for each that is asked. Loading this asks nobody."""

import datetime as dt
from collections.abc import Iterator

import dagster as dg

from mail_pipelines.assets import markdown, synced
from mail_pipelines.config import ReputationSettings
from mail_pipelines.reputation.readings import GOOGLE, MICROSOFT, configured
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.queues import SOURCES_POOL
from mail_pipelines.sources.errors import SourceError

STANDING_CHECK = "in_good_standing"
FRESH_FOR = dt.timedelta(hours=26)
_WORDS = {
    GOOGLE: "What Google's Postmaster Tools tell of each sending domain, day by day: spam rate, delivery errors, authentication.",
    MICROSOFT: "What Microsoft's SNDS tells of each address of ours, day by day: complaint rate, filter result, trap hits.",
}


def asset_key(source: str) -> dg.AssetKey:
    return dg.AssetKey([source, "reputation"])


def reputation_assets(settings: ReputationSettings) -> list[dg.AssetsDefinition]:
    """`[google_postmaster, reputation]` and `[microsoft_snds, reputation]`, as far as there are credentials."""
    return [_asset(source) for source in configured(settings)]


def _asset(source: str) -> dg.AssetsDefinition:
    key = asset_key(source)

    @dg.asset(
        key=key,
        group_name=synced.GROUP,
        owners=["team:delivery"],
        kinds={"sql"},
        description=_WORDS[source],
        pool=SOURCES_POOL,
        freshness_policy=dg.FreshnessPolicy.time_window(fail_window=FRESH_FOR),
        check_specs=[
            dg.AssetCheckSpec(synced.CHECK, asset=key, description="The provider could be asked, and tells of days that are not long ago; if not, the reason."),
            dg.AssetCheckSpec(
                STANDING_CHECK, asset=key, description="No domain or address is at a limit for which a warm-up steps back or a domain is stopped."
            ),
        ],
    )
    def reputation(context: dg.AssetExecutionContext, database: CentralDatabase) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        # Loaded by this asset alone: every send run imports this module.
        from mail_pipelines.capacity import domain_breakers
        from mail_pipelines.delivery import plots
        from mail_pipelines.reputation import report, syncing

        now = dt.datetime.now(dt.UTC)
        try:
            standing = syncing.run(database.engine, database.settings.reputation, source, now)
        except SourceError as error:
            yield dg.AssetCheckResult(check_name=synced.CHECK, asset_key=key, passed=False, description=str(error))
            raise dg.Failure(str(error), allow_retries=False) from None
        for breaker in domain_breakers.judge(database.engine):
            context.log.warning("%s", breaker)
        found = report.read(database.engine, source, now)
        yield dg.MaterializeResult(
            asset_key=key,
            metadata={
                "dagster/row_count": found.count,
                **standing.counts,
                "rejected": sum(standing.rejected.values()),
                "rejected_by_reason": dict(standing.rejected),
                "not_told_of": dict(standing.refused),
                "newest_day": found.newest_day,
                "worst_spam_rate": found.worst,
                "newest": markdown.table(found.table),
                "spam_rates": markdown.picture(plots.spam_rates(found.rates), "Part of the messages reported as spam, day by day"),
            },
            check_results=[
                dg.AssetCheckResult(
                    check_name=synced.CHECK,
                    asset_key=key,
                    passed=not found.problems,
                    severity=dg.AssetCheckSeverity.WARN,
                    description="; ".join(found.problems) or "in step",
                ),
                dg.AssetCheckResult(
                    check_name=STANDING_CHECK,
                    asset_key=key,
                    passed=not found.bad,
                    severity=dg.AssetCheckSeverity.WARN,
                    description="; ".join(found.bad) or "in good standing",
                ),
            ],
        )

    return reputation
