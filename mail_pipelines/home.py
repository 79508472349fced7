"""The home folder: everything one installation keeps on disk, and the environment that Dagster's own commands need.

What belongs here: making the folder and bringing it up to date. What does not: judging it (`doctor`), running it (`up`).
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from mail_pipelines import config, config_text
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.resources import queues

TOKEN_KEY_FILE = "{home}/secrets/token_key"
SIGNING_KEY_FILE = "{home}/secrets/signing_key"


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


def make(environ: Mapping[str, str] = os.environ, *, production: bool = False) -> list[str]:
    """Make the home folder, or bring an older one up to date; returns a line for each thing that was done.

    May be repeated at any time: what exists is kept, schemas are upgraded. The folder holds personal data and keys, so only
    its owner may read it. `production`: of a centre whose runs go to workers, or (where MAIL_PIPELINES_SERVER is set) of one of its
    dispatch servers, which makes no key and leaves the databases alone: both are the centre's.
    """
    home = config.home_folder(environ)
    with _unwritable_is_said(home):
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        opened = os.open(home, os.O_RDONLY)
    try:
        # Another that makes this home waits: two that make the same tables at once end with an error, Dagster's storage among them.
        fcntl.flock(opened, fcntl.LOCK_EX)
        return _make(home, environ, production)
    finally:
        os.close(opened)


def _make(home: Path, environ: Mapping[str, str], production: bool) -> list[str]:
    server = queues.this_server(environ)
    done = []
    with _unwritable_is_said(home):
        if _first_configuration(home, production=production, is_server=server is not None):
            done.append(f"wrote {home / config.CONFIG_FILE}" + ("" if server else " and new keys" if production else " and a new token key"))
        settings = config.load(environ)
        settings.token_key()
        if production and not server and not settings.broker.signing_key:
            raise HomeError(f"{home} was made without --production: make a new home, with the token key of this one in its secrets/token_key")
        for folder in _folders(settings):
            folder.mkdir(parents=True, exist_ok=True)
        if _write_new(settings.dagster_home / "dagster.yaml", _shipped_dagster_yaml(production), 0o644):
            done.append(f"wrote {settings.dagster_home / 'dagster.yaml'}")
    if server is None:
        done += upgrade_central_database(settings)
        _upgrade_dagster(settings.dagster_home)
        if production:
            _renew_server_storage(settings)
    return done


@contextlib.contextmanager
def _unwritable_is_said(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HomeError(f"{error.filename or home} cannot be made: {error.strerror}; MAIL_PIPELINES_HOME names the folder to use") from error


def _first_configuration(home: Path, *, production: bool, is_server: bool) -> bool:
    """Write `config.toml` and the keys it refers to. A key is made only with the file: a new one would void all links ever mailed."""
    from mail_pipelines.resources import orders

    if (home / config.CONFIG_FILE).exists():
        return False
    given = {"sending.token_key": f'token_key_file = "{TOKEN_KEY_FILE}"'}
    (home / "secrets").mkdir(mode=0o700, exist_ok=True)
    # The keys first: a crash between the two leaves keys that the next `init` uses.
    if not is_server:
        _write_new(Path(TOKEN_KEY_FILE.format(home=home)), secrets.token_hex(32) + "\n", 0o600)
    if production and not is_server:
        place = Path(SIGNING_KEY_FILE.format(home=home))
        _write_new(place, orders.new_signing_key() + "\n", 0o600)
        given["broker.signing_key"] = f'signing_key_file = "{SIGNING_KEY_FILE}"'
        given["broker.verify_key"] = f'verify_key = "{orders.verify_key_of(place.read_text().strip())}"'
    return _write_new(home / config.CONFIG_FILE, config_text.template(given), 0o600)


def _folders(settings: config.Settings) -> list[Path]:
    server, archive = settings.server, Path(settings.campaigns.archive)
    return [
        settings.dagster_home,
        settings.snapshot_folder,
        Path(server.run_folder),
        Path(server.log_folder),
        Path(server.mail_folder),
        Path(settings.operation.inbox),
        # Another folder, or a disk that is mounted there, is somebody else's to make.
        *([archive] if archive.is_relative_to(settings.home) else []),
    ]


def _shipped_dagster_yaml(production: bool) -> str:
    return (checkout() / "infra/dagster" / ("production" if production else "embedded") / "dagster.yaml").read_text(encoding="utf-8")


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


def upgrade_central_database(settings: config.Settings) -> list[str]:
    """Bring the central database to this version's schema; returns a line if there was something to do."""
    # Not above: a worker, which asks only for `environment`, becomes another program before it needs any of them.
    from mail_pipelines.capacity import limits
    from mail_pipelines.database import engine, migrate

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


def _renew_server_storage(settings: config.Settings) -> None:
    """What servers see of Dagster's storage follows its tables."""
    from mail_pipelines.database import engine
    from mail_pipelines.resources import server_storage

    opened = engine.open_engine(settings.database)
    server_storage.renew(opened, settings)
    opened.dispose()
