"""Servers that are made here: whether the sources of hosts could be used when they are needed, and how those that are being made go on.

What belongs here: what can be seen without asking a hoster. What does not: a server that serves (`fleet`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.doctor.finding import SHOWN, Finding
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.provisioning import ssh_keys, store
from mail_pipelines.provisioning.dns import publishers
from mail_pipelines.provisioning.interfaces import HostSource, ProvisioningError
from mail_pipelines.provisioning.sources import reading
from mail_pipelines.provisioning.sources.command import Command
from mail_pipelines.provisioning.sources.inventory import Inventory


def check_making(connection: sa.Connection, settings: config.Settings) -> Iterator[Finding]:
    """What would keep servers from being made, and those that are being made and do not come on by themselves."""
    sources: list[HostSource] = []
    try:
        sources += reading.read(settings).sources
        publishers.publisher_of(settings.dns)
    except MailPipelinesError as error:
        yield Finding("provisioning", str(error), "correct it: no server can be made or removed until then (docs/provisioning.md)")
    if sources and config.project_folder() is None:
        yield Finding("provisioning", "no checkout is found here, and so no playbook", "run the centre from a whole checkout: no server can be made until then")
    for source in sources:
        for problem in _lacking(source, settings):
            yield Finding("provisioning", f"host source {source.name}: {problem}", "no server can be made from it until then (docs/provisioning.md)")
    for one in store.making(connection)[:SHOWN]:
        if one.records:
            waits = f"server {one.key} waits for {len(one.records)} DNS records"
            yield Finding("provisioning", waits, "publish what `mail-pipelines server provisions` prints")
        elif one.reason:
            yield Finding("provisioning", f"server {one.key} is {one.standing}", "it is tried again; see `mail-pipelines server provisions`")
    for name, reason in store.set_aside(connection).items():
        yield Finding("provisioning", f"host source {name} is set aside: {reason}", f"`mail-pipelines server sources --use-again {name}` when that is over")


def _lacking(source: HostSource, settings: config.Settings) -> Iterator[str]:
    """What a source lacks that would show only when a server is ordered."""
    if source.kind == "exim" and not settings.provisioning.domain:
        yield "its servers need names: set provisioning.domain"
    if source.cost_per_hour and not settings.provisioning.budget:
        yield f"a host costs {source.cost_per_hour:g} an hour, and provisioning.budget is 0"
    if isinstance(source, Command) and shutil.which(source.words[0]) is None:
        yield f"its command {source.words[0]} is not there, or may not be run"
    files = {source.key_file} if isinstance(source, Command) else {host.key_file for host in source.hosts} if isinstance(source, Inventory) else set()
    for file in sorted(files):
        try:
            ssh_keys.public_of_file(Path(file))
        except ProvisioningError as error:
            yield str(error)
