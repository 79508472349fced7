"""Whether this host could send now: what is asked of a dispatch server that has just been made or changed.

What belongs here: its own settings, accounts, processes and queues. What does not: the rest of the fleet, holds, Dagster's daemon (`doctor`), and what the
world says of its address.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping

from mail_pipelines import config
from mail_pipelines.database import migrate
from mail_pipelines.database.engine import DatabaseError, database_now, open_engine, reading
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.files import DispatchError
from mail_pipelines.doctor import broker, central, host, waiting
from mail_pipelines.doctor.finding import Finding

_POLL_SECONDS = 1.0
_EXIM_LOG = "see `journalctl --unit mail-pipelines-exim`"


def examine(environ: Mapping[str, str] = os.environ, *, wait_seconds: float = 0) -> list[Finding]:
    """What keeps this host from sending. `wait_seconds`: how long to look again as long as anything does, as while its processes start."""
    end = time.monotonic() + wait_seconds
    while (found := list(_look(environ))) and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    return found


def _look(environ: Mapping[str, str]) -> Iterator[Finding]:
    try:
        settings, members = config.load(environ), config.members(environ)
    except config.ConfigError as error:
        yield Finding("configuration", str(error), "correct it; `mail-pipelines config reference` lists the keys")
        return
    if not members:
        yield Finding("configuration", f"{config.SERVER_VARIABLE} is not set: this host speaks for no dispatch server", "set it to the server's name")
        return
    yield from host.check_home(settings)
    yield from host.check_token_key(settings)
    yield from host.check_dagster_home(settings, environ)
    yield from host.check_disk(settings)
    yield from host.check_doors(settings, members)
    yield from host.check_addresses(members)
    for name, own in members.items():
        yield from check_server(name, own)
    broken = list(broker.check_broker(settings))
    yield from broken or check_workers(settings, members)


def check_server(name: str, settings: config.Settings) -> Iterator[Finding]:
    """One server of this host: its account of the central database, and the process that keeps its name there."""
    engine = open_engine(settings.database, answer_seconds=waiting.ANSWER_SECONDS)
    try:
        migrate.require_schema(engine)
        with reading(engine) as connection:
            yield from central.check_clock(connection)
            server = servers.find(connection, name)
            if server.is_silent(database_now(connection), settings.server.heartbeat_seconds):
                yield Finding("server", f"server {name} has no heartbeat", _EXIM_LOG)
            elif server.shortage:
                yield Finding("server", server.shortage, "make room on that disk")
    except (DatabaseError, DispatchError) as error:
        yield Finding("database", str(error), f"`mail-pipelines server account {name}` at the centre makes its account; the upgrade of the centre comes first")
    finally:
        engine.dispose()


def check_workers(settings: config.Settings, members: Mapping[str, config.Settings]) -> Iterator[Finding]:
    """Whether somebody takes the runs of each server: its worker at its own queue, the control worker at that of audits."""
    from mail_pipelines.resources import queues, tasks

    if not settings.broker.url:
        yield Finding("broker", "broker.url is not set: no run can reach this server", "set it to the server's own account (docs/production.md)")
        return
    with tasks.make_app(settings).connection_for_read() as connection:
        for name in members:
            for queue, unit in ((name, "mail-pipelines-worker"), (queues.control_queue(name), "mail-pipelines-control")):
                # A queue that is not there closes its channel.
                with connection.channel() as channel:
                    try:
                        readers = channel.queue_declare(queue, passive=True).consumer_count
                    except connection.channel_errors:
                        readers = 0
                if not readers:
                    yield Finding("worker", f"no worker reads queue {queue}", f"see `journalctl --unit {unit}`")
