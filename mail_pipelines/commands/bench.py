"""Measure the budgets of the design, each against a reference measured in the same run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mail_pipelines.commands.context import console
from mail_pipelines.commands.server import Mode

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from mail_pipelines.benchmarks.contract import Result

app = typer.Typer(no_args_is_help=True, help=__doc__)
Quick = Annotated[bool, typer.Option("--quick", help="smaller data, under 40 s")]
Json = Annotated[bool, typer.Option("--json", help="end with one line of JSON")]
Database = Annotated[str | None, typer.Option(help="URL of an empty MariaDB or MySQL database; without it a private server is started")]


@app.command("segment")
def segment(quick: Quick = False, as_json: Json = False) -> None:
    """Segments by attributes and by behaviour, on large snapshots."""
    from mail_pipelines.benchmarks import segment as bench

    _show("segment", bench.run(quick), as_json)


@app.command("compose")
def compose(quick: Quick = False, as_json: Json = False) -> None:
    """Messages composed a second, against the standard library."""
    from mail_pipelines.benchmarks import compose as bench

    _show("compose", bench.run(quick), as_json)


@app.command("sign")
def sign(quick: Quick = False, as_json: Json = False) -> None:
    """Messages composed and signed a second, against raw RSA-2048 signatures and against the standard library with dkimpy."""
    from mail_pipelines.benchmarks import sign as bench

    _show("sign", bench.run(quick), as_json)


@app.command("audience")
def audience(quick: Quick = False, as_json: Json = False, database: Database = None) -> None:
    """Freezing an audience into MariaDB."""
    from mail_pipelines.benchmarks import audience as bench

    with _migrated(database) as (engine, _):
        results = bench.run(quick, engine)
    _show("audience", results, as_json)


@app.command("sync")
def sync(quick: Quick = False, as_json: Json = False, database: Database = None) -> None:
    """A million contacts synced from MariaDB to MariaDB, all new and then one in twenty changed."""
    from mail_pipelines.benchmarks import sync as bench

    with _migrated(database) as (engine, processes):
        results = bench.run(100_000 if quick else 1_000_000, engine, console.print, lambda: processes)
    _show("sync", results, as_json)


@contextmanager
def _migrated(database: str | None) -> Iterator[tuple[Engine, list[int]]]:
    """The given database, or one of a private server, with our tables; and the processes of the server, if it is private."""
    from mail_pipelines.benchmarks.mariadb import MariaDB
    from mail_pipelines.database import engine, migrate

    with tempfile.TemporaryDirectory(prefix="mail-pipelines-bench-") as folder:
        server = None if database else MariaDB(Path(folder)).start()
        try:
            opened = engine.create_engine(database or server.database())  # type: ignore[union-attr]
            migrate.upgrade(opened)
            yield opened, [server.process.pid] if server and server.process else []
            opened.dispose()
        finally:
            if server is not None:
                server.stop()


@app.command("claim")
def claim(quick: Quick = False, as_json: Json = False, database: Database = None) -> None:
    """Claims and results on MariaDB by eight claimers at once; memory of a send run."""
    from mail_pipelines.benchmarks import claim as bench

    _show("claim", bench.run(quick, database), as_json)


@app.command("ledger")
def ledger(
    plot: Annotated[Path | None, typer.Option(help="write a picture of the figures by size there")] = None,
    only_import: Annotated[bool, typer.Option("--only-import", help="only claims beside an import")] = False,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Claims, results, sensors and pages on MariaDB with 0.1, 1 and 10 million contacts, three tenths of them in campaigns that are sent."""
    from mail_pipelines.benchmarks import ledger as bench

    found: list[bench.Figures] = []
    if plot is not None and only_import:
        raise typer.BadParameter("--plot draws all figures: leave out --only-import")
    results = bench.run(quick, found.append, only_import=only_import)
    if plot is not None:
        bench.plot(found, plot)
    _show("ledger", results, as_json)


@app.command("audit")
def audit(quick: Quick = False, as_json: Json = False) -> None:
    """Lines of a server's log read a second and held against the ledger on MariaDB."""
    from mail_pipelines.benchmarks import audit as bench

    _show("audit", bench.run(quick), as_json)


@app.command("plan")
def plan(quick: Quick = False, as_json: Json = False) -> None:
    """The near plan of 100 servers, 50 providers and 20 campaigns: seconds on one core, and how near it is to the best."""
    from mail_pipelines.benchmarks import plan as bench

    _show("plan", bench.run(quick), as_json)


@app.command("fleet")
def fleet(
    seconds: Annotated[float | None, typer.Option(min=4, help="least time of each campaign; ten slots if not given, --quick: 12")] = None,
    slot_seconds: Annotated[int, typer.Option(min=5, max=900, help="length of a slot, an even part of 900, which it is in operation")] = 30,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Campaigns by 1, 2, 4 and 8 rate-limited servers: when they end, against the plan's lower bound, and how long any idles that might send."""
    from mail_pipelines.benchmarks import fleet as bench

    if 900 % slot_seconds:
        raise typer.BadParameter("900 is no multiple of it", param_hint="--slot-seconds")
    _show("fleet", bench.run(quick, seconds, slot_seconds), as_json)


@app.command("crash")
def crash(
    kills: Annotated[
        int | None, typer.Option(min=1, help="in all, of which each kind gets its share, and at least two; 1,000 if not given, --quick: 2")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the schedule")] = 1,
    kind: Annotated[list[str] | None, typer.Option(help="only this kind; may be repeated; with --quick that of the send run if not given")] = None,
    mode: Annotated[Mode, typer.Option(help="in which Exim sends")] = Mode.CUTTHROUGH,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """What kills do to messages on their way through Exim: lost, duplicates and unknown, counted at the destinations. Needs root."""
    from mail_pipelines.benchmarks import crash as bench

    def report(verdict: bench.Verdict) -> None:
        count = verdict.count
        console.print(
            f"{verdict.kind}: {verdict.kills} of {verdict.kills_asked} kills, {count.recipients} recipients, {count.arrived} arrived, {count.lost} lost, "
            f"{count.duplicates} duplicates, {count.unknown} unknown of at most {verdict.bound + count.unanswered}, {verdict.seconds:.0f} s"
        )

    _show("crash", bench.run(quick, kills, seed, kind or (), report, mode=mode), as_json)


@app.command("send")
def send(quick: Annotated[bool, typer.Option("--quick", help="fewer and shorter runs: about 50 s")] = False, as_json: Json = False) -> None:
    """Messages sent a second: into a sink, and through Exim with ledger and journal."""
    from mail_pipelines.benchmarks import send as bench

    _show("send", bench.run(quick), as_json)


@app.command("far-centre")
def far_centre(quick: Quick = False, as_json: Json = False) -> None:
    """Messages sent a second where the central database is 80 ms away over a line that loses packets, against one nearby."""
    from mail_pipelines.benchmarks import far_centre as bench

    _show("far-centre", bench.run(quick), as_json)


@app.command("scale")
def scale(quick: Annotated[bool, typer.Option("--quick", help="fewer runs, of a campaign that is a draft: under 40 s")] = False, as_json: Json = False) -> None:
    """What a send run with nothing to send costs in a warm worker, and what runs leave in Dagster's storage."""
    from mail_pipelines.cluster import scale as bench

    _show("scale", bench.run(quick, console), as_json)


@app.command("campaign")
def campaign(
    recipients: Annotated[int | None, typer.Option(min=1000, help="1,000,000 if not given, --quick: 1,000")] = None,
    servers: Annotated[int | None, typer.Option(min=1, help="each with its own Exim; 4 if not given, --quick: 2")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer recipients and servers: under a minute")] = False,
    as_json: Json = False,
) -> None:
    """One campaign from import to report, by a centre and several servers with Exim: seconds of each stage, messages a second, lost, duplicates."""
    from mail_pipelines.cluster import benchmark as bench

    people, fleet, queued = (1_000, 2, 150) if quick else (1_000_000, 4, 1500)
    _show("campaign", bench.run(recipients or people, servers or fleet, console, queued=queued), as_json)


def _show(name: str, results: list[Result], as_json: bool) -> None:
    from rich.table import Table

    from mail_pipelines.benchmarks.contract import document

    table = Table("figure", "value", "reference", "ratio", "target", "met")
    for result in results:
        value, reference = f"{result.value:,.3f} {result.unit}", f"{result.reference:,.3f}"
        table.add_row(result.name, value, reference, f"{result.ratio:.3f}", f"{result.target:g}", "yes" if result.met else "no")
    console.print(table)
    if as_json:
        typer.echo(document(name, results))
