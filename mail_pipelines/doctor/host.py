"""This host: its home, keys, disk, ports and addresses."""

from __future__ import annotations

import itertools
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import sqlalchemy as sa

from mail_pipelines import config, doors
from mail_pipelines.database.engine import DatabaseError
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.exim import instance, process
from mail_pipelines.dispatch.files import DispatchError, ServerFolders
from mail_pipelines.doctor import waiting
from mail_pipelines.doctor.finding import Finding
from mail_pipelines.runbook import Chapter


def check_home(settings: config.Settings) -> Iterator[Finding]:
    for path in (settings.home / config.CONFIG_FILE, settings.dagster_home / "dagster.yaml"):
        if not path.is_file():
            yield Finding("home", f"{path} is missing", "run `mail-pipelines init`, or set MAIL_PIPELINES_HOME to the folder that was meant")


def check_token_key(settings: config.Settings) -> Iterator[Finding]:
    try:
        settings.token_key()
    except config.ConfigError as error:
        yield Finding("token key", str(error), "bring back the key that earlier mail was sent with: with another one its links and bounces are not recognised")


def check_dagster_home(settings: config.Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    given = environ.get("DAGSTER_HOME")
    remedy = 'eval "$(mail-pipelines env)"'
    if not given:
        yield Finding("DAGSTER_HOME", "DAGSTER_HOME is not set: `dagster` commands would use a temporary folder", remedy)
    elif Path(given).expanduser().resolve() != settings.dagster_home.resolve():
        yield Finding("DAGSTER_HOME", f"DAGSTER_HOME is {given}, but this home's is {settings.dagster_home}", remedy)


def check_alerts(settings: config.Settings) -> Iterator[Finding]:
    """Half a configuration tells nobody, which nobody would be told."""
    from mail_pipelines.alerts.channels import ChannelError, channels_of

    try:
        channels_of(settings.alerts)
    except ChannelError as error:
        yield Finding("alerts", str(error), "until then nobody is told of anything; `mail-pipelines alert test` tries it")


def check_disk(settings: config.Settings) -> Iterator[Finding]:
    folders = {settings.home, settings.snapshot_folder, Path(settings.server.log_folder)}
    # Folders of one file system share one finding.
    devices = {folder.stat().st_dev: folder for folder in sorted(folders) if folder.is_dir()}
    for folder in devices.values():
        free_mb = shutil.disk_usage(folder).free // 1_000_000
        if free_mb < settings.operation.min_free_mb:
            yield Finding(
                "disk",
                f"{free_mb} MB are free on the disk of {folder}, fewer than {settings.operation.min_free_mb}",
                f"make room (operation.min_free_mb); {Chapter.DISK_FULL.place}",
            )


def check_doors(settings: config.Settings, members: Mapping[str, config.Settings]) -> Iterator[Finding]:
    """Ports that ask for no login and are open to other hosts. Without the database, those of registered servers are not known."""
    found: dict[doors.Listener, doors.Door] = {}
    # An account of the database shows no server but its own, and each tells its metrics at a port of its own.
    for one in members.values() or [settings]:
        try:
            with waiting.connected(one) as connection:
                fleet = servers.all_servers(connection)
        except (DatabaseError, sa.exc.SQLAlchemyError):
            fleet = []
        here = [server for server in fleet if server.key in members or ServerFolders.of(one.server, server.key).journal.exists()]
        found |= {door.listener: door for door in doors.open_doors(one, here)}
    for door in found.values():
        yield Finding("doors", f"{door.what} is open to other hosts at {door.listener}", door.remedy)


def check_addresses(members: Mapping[str, config.Settings]) -> Iterator[Finding]:
    """One server is one sending address, of this host; and one account, token key and port."""
    try:
        if len(members) > 1:
            process.check(members)
    except instance.EximError as error:
        yield Finding("addresses", str(error), "docs/production.md has how a host is several servers")
        return
    for name, settings in members.items():
        if (address := settings.server.address) and not _is_of_this_host(address):
            yield Finding("addresses", f"server {name} is to send from {address}, which no interface of this host has", "give it to one, or set server.address")
    if len(members) < 2:
        return
    ports: dict[int, str] = {}
    for name, settings in members.items():
        try:
            with waiting.connected(settings) as connection:
                port = servers.find(connection, name).port
        except (DatabaseError, DispatchError) as error:
            yield Finding("addresses", f"server {name}: {error}", "each server of a host has an account of its own at the central database")
            continue
        if port in ports:
            yield Finding("addresses", f"servers {ports[port]} and {name} have the same port {port}", f"`mail-pipelines server add {name} --port` another one")
        ports[port] = name
    if (told := [settings.metrics.port for settings in members.values() if settings.metrics.port]) and len(told) != len(set(told)):
        yield Finding("addresses", "servers of this host tell their metrics at the same port", "set metrics.port in the file of each server")
    for (one, left), (other, right) in itertools.combinations(members.items(), 2):
        # Those that were never given accounts of their own all have the installation's.
        if left.database.url != right.database.url and left.sending.token_key == right.sending.token_key:
            yield Finding(
                "addresses",
                f"servers {one} and {other} have the same token key, though each has an account of its own",
                "set sending.token_key_file in the file of each to a copy of what `mail-pipelines server account NAME` made for it",
            )


def _is_of_this_host(address: str) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
