"""The parts by which servers are made here, and how many more are wanted: the one place where they are chosen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import dagster as dg
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines import config
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import database_now, reading
from mail_pipelines.dispatch.archive import Archive
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.provisioning.credentials import Accounts
from mail_pipelines.provisioning.interfaces import Parts
from mail_pipelines.provisioning.proposals import Wanted
from mail_pipelines.resources.broker_accounts import BrokerAccounts
from mail_pipelines.resources.server_storage import ServerStorage

if TYPE_CHECKING:
    from mail_pipelines.capacity.new_servers import HostSources


def parts_of(engine: sa.Engine, settings: Settings) -> Parts:
    """Raises `HostsError` for a file of host sources that cannot be used, `DnsError` for a publisher that lacks a setting, and `MailPipelinesError` outside a
    checkout.
    """
    # Every worker loads this module, and only the centre makes servers.
    from mail_pipelines.provisioning.dns.publishers import publisher_of
    from mail_pipelines.provisioning.playing import Ansible
    from mail_pipelines.provisioning.sources import reading as hosts_file
    from mail_pipelines.provisioning.sources.catchers import Starter
    from mail_pipelines.provisioning.verifying import Sends, Speaks

    folder = config.project_folder()
    if folder is None:
        raise MailPipelinesError("no checkout found, and so no playbook: neither above this package nor above the current folder is a workspace.yaml")
    hosts = hosts_file.read(settings)
    return Parts(
        engine,
        settings,
        hosts.sources,
        {"exim": Ansible(settings, folder / "infra/ansible", hosts.variables), "catcher": Starter(settings)},
        accounts_of(engine, settings),
        publisher_of(settings.dns),
        {"exim": Sends(engine, settings), "catcher": Speaks(engine, settings)},
        Archive.of(settings.server.log_archive),
        _warm_up,
    )


def accounts_of(engine: sa.Engine, settings: Settings) -> Accounts:
    """Accounts of servers in all databases, and at the broker where there is one."""
    return Accounts(engine, settings, ServerStorage(engine, settings, os.environ), BrokerAccounts.of(settings.broker))


def _warm_up(connection: Connection, key: str, curve: str) -> None:
    from mail_pipelines.capacity import warm_up

    warm_up.set_by_hand(connection, key, database_now(connection), curve=curve)


class Provisioning(dg.ConfigurableResource):
    """Making and removing servers, and how many more are wanted."""

    def parts(self, engine: sa.Engine, settings: Settings) -> Parts:
        return parts_of(engine, settings)

    def wanted(self, engine: sa.Engine, settings: Settings) -> Sequence[Wanted]:
        """What the capacity plan in force orders now, for each pool."""
        from mail_pipelines.capacity import shortage

        following = host_sources(engine, settings).next
        with reading(engine) as connection:
            return shortage.wanted(connection, curve=None if following is None else following.curve)


def host_sources(engine: sa.Engine, settings: Settings) -> HostSources:
    """Where servers come from, as the capacity plan sees it. Raises `HostsError` for a file of host sources that cannot be used."""
    from mail_pipelines.capacity.new_servers import HostSources, NextSource
    from mail_pipelines.provisioning import proposals
    from mail_pipelines.provisioning.sources import reading as hosts_file

    sources = hosts_file.read(settings).sources
    with reading(engine) as connection:
        following = proposals.next_source(connection, sources)
    curves = {source.name: source.curve for source in sources}
    return HostSources(None if following is None else NextSource(following.curve, following.cost_per_hour), curves)
