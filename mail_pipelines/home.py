"""The home folder: everything one installation keeps on disk, and the environment that Dagster's own commands need.

What belongs here: making the folder and bringing it up to date. What does not: judging it (`doctor`), running it (`up`).
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from mail_pipelines import config, config_text
from mail_pipelines.capacity import limits
from mail_pipelines.database import engine, migrate
from mail_pipelines.errors import MailPipelinesError

TOKEN_KEY_FILE = "{home}/secrets/token_key"


class HomeError(MailPipelinesError):
    """The home folder cannot be made or used."""


def environment(settings: config.Settings) -> dict[str, str]:
    """The variables that make `dagster` commands and child processes use this home."""
    return {"DAGSTER_HOME": str(settings.dagster_home), "MAIL_PIPELINES_HOME": str(settings.home)}


def checkout() -> Path:
    """The folder with `workspace.yaml` and `infra`. Raises `HomeError` if this package runs outside a checkout."""
    folder = config.project_folder()
    if folder is None:
        raise HomeError("no checkout found: neither above this package nor above the current folder is a workspace.yaml; change into the checkout")
    return folder


def make(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Make the home folder, or bring an older one up to date; returns a line for each thing that was done.

    May be repeated at any time: what exists is kept, schemas are upgraded. The folder holds personal data and keys, so only
    its owner may read it.
    """
    done = []
    home = config.home_folder(environ)
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _first_configuration(home):
            done.append(f"wrote {home / config.CONFIG_FILE} and a new token key")
        settings = config.load(environ)
        settings.token_key()
        for folder in _folders(settings):
            folder.mkdir(parents=True, exist_ok=True)
        if _write_new(settings.dagster_home / "dagster.yaml", _shipped_dagster_yaml(), 0o644):
            done.append(f"wrote {settings.dagster_home / 'dagster.yaml'}")
    except OSError as error:
        raise HomeError(f"{error.filename or home} cannot be made: {error.strerror}; MAIL_PIPELINES_HOME names the folder to use") from error
    done += _upgrade_central_database(settings)
    _upgrade_dagster(settings.dagster_home)
    return done


def _first_configuration(home: Path) -> bool:
    """Write `config.toml` and the key it refers to. A key is made only with the file: a new one would void all links ever mailed."""
    if (home / config.CONFIG_FILE).exists():
        return False
    key_file = Path(TOKEN_KEY_FILE.format(home=home))
    key_file.parent.mkdir(mode=0o700, exist_ok=True)
    # The key first: a crash between the two leaves a key that the next `init` uses.
    _write_new(key_file, secrets.token_hex(32) + "\n", 0o600)
    text = config_text.template({"sending.token_key": f'token_key_file = "{TOKEN_KEY_FILE}"'})
    return _write_new(home / config.CONFIG_FILE, text, 0o600)


def _folders(settings: config.Settings) -> list[Path]:
    server = settings.server
    return [
        settings.dagster_home,
        settings.snapshot_folder,
        Path(server.run_folder),
        Path(server.log_folder),
        Path(server.mail_folder),
        Path(settings.operation.inbox),
    ]


def _shipped_dagster_yaml() -> str:
    return (checkout() / "infra/dagster/embedded/dagster.yaml").read_text(encoding="utf-8")


def _write_new(path: Path, text: str, mode: int) -> bool:
    """Write a file whole or not at all, unless it exists; whether it was written."""
    if path.exists():
        return False
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    return True


def _upgrade_central_database(settings: config.Settings) -> list[str]:
    opened = engine.open_engine(settings.database)
    before, newest = migrate.revision(opened), migrate.newest_revision()
    migrate.upgrade(opened)
    limits.write_defaults(opened)
    opened.dispose()
    where = config.mask_url(settings.database.url)
    if before is None:
        return [f"made the tables of {where}"]
    return [f"upgraded {where} from schema {before} to {newest}"] if before != newest else []


def _upgrade_dagster(dagster_home: Path) -> None:
    """Make or upgrade Dagster's own storage, so that its web server and daemon do not race to do it at their first start."""
    from dagster import DagsterInstance

    # Dagster prints its progress, even where there is nothing to do.
    with DagsterInstance.from_config(str(dagster_home)) as instance, contextlib.redirect_stdout(io.StringIO()):
        instance.upgrade()
