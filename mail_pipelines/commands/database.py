"""The central database: its schema, and its move from an embedded one to MySQL or MariaDB."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Annotated

import typer

from mail_pipelines.commands.context import console, settings

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command()
def upgrade() -> None:
    """Bring the schema to this version's: `init` does it too. Safe to repeat."""
    from mail_pipelines import home

    done = home.upgrade_central_database(settings())
    console.print(*(done or ["the schema is this version's"]), sep="\n", markup=False, highlight=False)


@app.command()
def copy(
    to: Annotated[str, typer.Option(help="URL of an empty database: mysql+pymysql://USER@HOST/NAME")],
    password_file: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="file with the password for it")] = None,
) -> None:
    """Move an embedded installation to MySQL or MariaDB. Stop `mail-pipelines up` first.

    Everything is held meanwhile; an interrupted copy goes on when the command is given again. At the end both databases are compared row by row,
    and the embedded one is given up: let database.url name the new one.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table

    from mail_pipelines import moving
    from mail_pipelines.config import mask_url
    from mail_pipelines.database import copying
    from mail_pipelines.database.engine import create_engine, open_engine

    source = open_engine(settings().database)
    target = create_engine(to, password_file.read_text(encoding="utf-8").strip() if password_file else None)
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True) as bars:
        tasks = {name: bars.add_task(name, total=rows, visible=rows > copying.ROWS) for name, rows in copying.sizes(source).items()}
        moved = moving.move(settings(), source, target, dt.datetime.now(dt.UTC), lambda table, rows: bars.advance(tasks[table], rows))
    if moved:
        shown = Table("table", "rows", "sha256 of both")
        for one in moved:
            shown.add_row(one.table, f"{one.rows:,}", one.sha256[:16])
        console.print(shown)
    console.print(f"{mask_url(to)} has it all: let database.url name it, and database.password_file.", markup=False, highlight=False)
