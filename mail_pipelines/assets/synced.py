"""Synced: the contacts and suppressions of each declared external source, what it is told, and why one is not in step. Loading this imports no dlt."""

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from sqlalchemy.engine import Engine

from mail_pipelines.dispatch.files import AlreadyRunning
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.queues import SOURCES_POOL
from mail_pipelines.sources import declaration, status
from mail_pipelines.sources.declaration import ENGAGEMENT, Contacts, Part, Section, Source, Suppressions
from mail_pipelines.sources.errors import DeclarationError

GROUP = "synced"
OWNERS = ["team:audience"]
CHECK = "in_step"
_WORDS: dict[Section, str] = {
    "contacts": "Contacts of the external source {name}, merged under the rules of consent. Nobody who left is subscribed again.",
    "suppressions": "Addresses that the external source {name} says must not be mailed. They are only ever added to, never taken back.",
}
# Of what is read, and of what is told.
_CHECKED = (
    "The last run could read and merge the source; if not, the reason.",
    "The source took all that was due, and nothing is in the dead letters; if not, the reason.",
)


def declared(home: Path) -> list[Source]:
    """The sources whose declaration can be read. One that cannot keeps its last good state, and `source list` says what is wrong with it."""
    found = []
    for path in declaration.files(home):
        try:
            found.append(declaration.read_file(path))
        except DeclarationError:
            continue
    return found


def synced_assets(sources: Sequence[Source]) -> list[dg.AssetsDefinition]:
    """One asset for each section of each source, `[<source>, <section>]`, suppressions before contacts, and `[<source>, engagement]`.

    Those of a source are one step: what it is told follows what is read of it, also where that failed, which a step of its own could not.
    """
    return [_assets(source) for source in sources]


def _assets(source: Source) -> dg.AssetsDefinition:
    keys: dict[Part, dg.AssetKey] = {part: dg.AssetKey([source.name, part]) for part in source.parts}

    @dg.multi_asset(
        name=f"sync_{source.name.replace('-', '_')}",
        specs=[_spec(source, part) for part in source.parts],
        check_specs=[dg.AssetCheckSpec(CHECK, asset=keys[part], description=_CHECKED[part == ENGAGEMENT]) for part in source.parts],
        can_subset=True,
        pool=SOURCES_POOL,
    )
    def synced(context: dg.AssetExecutionContext, database: CentralDatabase) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        from mail_pipelines.sources import turns

        engine, home = database.engine, database.settings.home

        def bring_up_to_date(part: Part) -> dg.MaterializeResult:
            return _tell(context, engine, home, source) if part == ENGAGEMENT else _read(context, engine, home, source, part)

        errors: list[Exception] = []
        for part, outcome in turns.in_turn([part for part in source.parts if keys[part] in context.selected_asset_keys], bring_up_to_date):
            if isinstance(outcome, Exception):
                errors.append(outcome)
                yield from _failed(engine, source, part, outcome)
            else:
                yield outcome
        if errors:
            error = turns.together(errors)
            if isinstance(error, MailPipelinesError):
                # A word of ours says it all, and what lies behind it may have a secret in it. What waits to be told is sent by the next run.
                raise dg.Failure(str(error), allow_retries=False) from None
            raise error

    return synced


def _spec(source: Source, part: Part) -> dg.AssetSpec:
    common: dict[str, Any] = {
        "group_name": GROUP,
        "owners": OWNERS,
        "freshness_policy": dg.FreshnessPolicy.time_window(fail_window=dt.timedelta(hours=source.fresh_hours)),
    }
    key = dg.AssetKey([source.name, part])
    if part == ENGAGEMENT:
        read = [dg.AssetKey([source.name, section]) for section in source.sections]
        told = f"What the external source {source.name} is told: each event at least once, always under the same key."
        return dg.AssetSpec(key, deps=read, description=told, kinds={"sql"}, **common)
    before = [dg.AssetKey([source.name, "suppressions"])] if part == "contacts" and source.suppressions else []
    columns = {"dagster/column_schema": _columns(source.sections[part])}
    return dg.AssetSpec(key, deps=before, description=_WORDS[part].format(name=source.name), kinds={"dlt", "sql"}, metadata=columns, **common)


def _read(context: dg.AssetExecutionContext, engine: Engine, home: Path, source: Source, section: Section) -> dg.MaterializeResult:
    # The source is built anew in every run: dlt fails on one that ran before in the process.
    from mail_pipelines.sources import running

    key = dg.AssetKey([source.name, section])
    report = running.run(engine, home, declaration.load(home, source.name), section)
    standing = report.standing
    context.log.info("%s: %s", section, ", ".join(f"{count:,} {name}" for name, count in standing.counts.items() if count) or "nothing new")
    rejected = sum(standing.rejected.values())
    return dg.MaterializeResult(
        asset_key=key,
        metadata={
            "dagster/row_count": standing.merged,
            "rows_in": standing.counts.get("read", 0),
            "merged": standing.merged,
            **{name: count for name, count in standing.counts.items() if name != "read"},
            "rejected": rejected,
            "rejected_by_reason": _reasons(standing.rejected),
            "subscriptions_ended": report.ended,
            "lag_seconds": report.lag_seconds,
            "seconds": standing.seconds,
            "cursor": standing.cursor or "",
        },
        check_results=[
            dg.AssetCheckResult(
                check_name=CHECK,
                asset_key=key,
                passed=standing.note is None,
                severity=dg.AssetCheckSeverity.WARN,
                description=standing.note or "in step",
                metadata={"rejected": rejected},
            )
        ],
    )


def _tell(context: dg.AssetExecutionContext, engine: Engine, home: Path, source: Source) -> dg.MaterializeResult:
    from mail_pipelines.sources import telling

    key = dg.AssetKey([source.name, ENGAGEMENT])
    report = telling.run(engine, home, declaration.load(home, source.name))
    standing, counts = report.standing, report.counts
    context.log.info("%s: %s", ENGAGEMENT, ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "nothing new")
    return dg.MaterializeResult(
        asset_key=key,
        metadata={
            "dagster/row_count": counts.get("pushed", 0),
            **counts,
            "waiting": standing.waiting,
            "dead_letters": standing.dead,
            "lag_seconds": round(report.lag_seconds, 3),
            "seconds": report.seconds,
        },
        check_results=[
            dg.AssetCheckResult(
                check_name=CHECK,
                asset_key=key,
                passed=not standing.dead,
                severity=dg.AssetCheckSeverity.WARN,
                description=f"{standing.dead:,} dead letters: `mail-pipelines source dead-letters {source.name}`" if standing.dead else "in step",
            )
        ],
    )


def _failed(engine: Engine, source: Source, part: Part, error: Exception) -> Iterator[dg.AssetCheckResult]:
    """The check of a run that failed: why, and how old the last good state is, which stays. Where another run is under way nothing is wrong."""
    if isinstance(error, AlreadyRunning):
        return
    metadata: dict[str, dg.MetadataValue] = {}
    if (good := status.read(engine, source.name, part).good_at) is not None:
        at = dt.datetime.fromisoformat(good)
        metadata = {"last_good": dg.MetadataValue.timestamp(at), "lag_seconds": dg.MetadataValue.float(_age(at))}
    yield dg.AssetCheckResult(check_name=CHECK, asset_key=[source.name, part], passed=False, description=status.words(error), metadata=metadata)


def _age(at: dt.datetime) -> float:
    return round((dt.datetime.now(dt.UTC) - at).total_seconds(), 3)


def _columns(resource: Contacts | Suppressions) -> dg.TableSchema:
    """What becomes what, as Dagster shows columns of a table."""
    types = resource.types if isinstance(resource, Contacts) else {}
    fields = set(resource.field_columns.values()) if isinstance(resource, Contacts) else set()

    def described(column: str, target: str) -> str:
        wins = f"; {resource.rule_of(target)} wins" if isinstance(resource, Contacts) and target in fields else ""
        return f"{column} at the source{wins}"

    return dg.TableSchema([dg.TableColumn(target, types.get(target, "text"), described(column, target)) for column, target in resource.map.items()])


def _reasons(rejected: Mapping[str, int]) -> dg.TableMetadataValue:
    """Reasons by which rows were left out, the most frequent first."""
    rows = sorted(rejected.items(), key=lambda item: -item[1])
    schema = dg.TableSchema([dg.TableColumn("reason", "string"), dg.TableColumn("rows", "int")])
    return dg.MetadataValue.table([dg.TableRecord({"reason": reason, "rows": count}) for reason, count in rows], schema)
