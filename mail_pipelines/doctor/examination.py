"""All checks at once.

What belongs here: which there are, in which order they are told, and how long each may take. What does not: the checks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from mail_pipelines import config
from mail_pipelines.doctor import broker, central, daemon, domains, host, waiting
from mail_pipelines.doctor.finding import Finding

# Whatever hangs in a way that no check has foreseen.
LONGEST_SECONDS = 90.0


def examine(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """All findings, in the order in which they are best dealt with; what waits for others is looked at in parallel.

    A configuration that cannot be read hides everything else; the file of one server hides only what is that server's.
    """
    try:
        settings, members, found = _configuration(environ)
    except config.ConfigError as error:
        return [_of_configuration(error)]
    is_centre = not config.servers_of_this_host(environ)

    # Each server of a host has an account of the database, which shows no server but that one, and a token key.
    each = {f"database of {server}": own for server, own in members.items()} if members else {"database": settings}

    def this_host() -> Iterator[Finding]:
        yield from host.check_home(settings)
        for own in each.values():
            yield from host.check_token_key(own)
        yield from host.check_dagster_home(settings, environ)
        yield from host.check_disk(settings)
        yield from host.check_doors(settings, members)
        yield from host.check_addresses(members)

    # Not in parallel among themselves: they import Dagster and Celery, which does not bear that.
    def runs() -> Iterator[Finding]:
        yield from broker.check_broker(settings)
        yield from daemon.check_storage_url(members, environ)
        yield from daemon.check_dagster(settings, is_centre=is_centre)

    looks: dict[str, Callable[[], Iterator[Finding]]] = {
        "host": this_host,
        **{name: partial(central.check_central_database, own, is_centre=is_centre) for name, own in each.items()},
        **({"domains": lambda: domains.check_domains(settings)} if is_centre else {}),
        "runs": runs,
    }
    begun = {name: waiting.begun(lambda look=look: list(look())) for name, look in looks.items()}  # type: ignore[misc]
    end = time.monotonic() + LONGEST_SECONDS
    for name, findings in begun.items():
        try:
            found += findings.result(max(0.0, end - time.monotonic()))
        except TimeoutError:
            found.append(Finding(name, f"not looked at within {LONGEST_SECONDS:g} s", "something that it asks hangs: see the other lines"))
    # What is true of the whole database each of them has found.
    return list(dict.fromkeys(found))


def _configuration(environ: Mapping[str, str]) -> tuple[config.Settings, dict[str, config.Settings], list[Finding]]:
    """The settings, those of each server of this host that can be read, and what is said of the others. Raises `ConfigError`."""
    members: dict[str, config.Settings] = {}
    found = []
    for server in config.servers_of_this_host(environ):
        try:
            members[server] = config.load_for(server, environ)
        except config.ConfigError as error:
            found.append(_of_configuration(error))
    # Where no server's can be read: what is common to them.
    return next(iter(members.values()), None) or config.load({**environ, config.SERVER_VARIABLE: ""}), members, found


def _of_configuration(error: config.ConfigError) -> Finding:
    return Finding("configuration", str(error), "correct it; `mail-pipelines config reference` lists the keys")
