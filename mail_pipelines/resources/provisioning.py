"""The parts by which servers are made here: the one place where they are chosen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from urllib.parse import urlsplit

import dagster as dg
import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import is_mysql
from mail_pipelines.dispatch.archive import Archive
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.provisioning.credentials import Accounts, OtherAccounts
from mail_pipelines.provisioning.interfaces import Parts
from mail_pipelines.provisioning.proposals import Wanted
from mail_pipelines.resources.broker_accounts import BrokerAccounts
from mail_pipelines.resources.storage_accounts import StorageAccounts


def parts_of(engine: sa.Engine, settings: Settings) -> Parts:
    """Raises `HostsError` for a file of host sources that cannot be used, and `MailPipelinesError` outside a checkout."""
    # Every worker loads this module, and only the centre makes servers.
    from mail_pipelines.provisioning.by_hand import ByHand, Keys
    from mail_pipelines.provisioning.playing import Ansible
    from mail_pipelines.provisioning.sources import reading
    from mail_pipelines.provisioning.sources.catchers import Starter
    from mail_pipelines.provisioning.speaking import Speaks

    folder = config.project_folder()
    if folder is None:
        raise MailPipelinesError("no checkout found, and so no playbook: neither above this package nor above the current folder is a workspace.yaml")
    hosts = reading.read(settings)
    speaks = Speaks(engine, settings)
    return Parts(
        engine,
        settings,
        hosts.sources,
        {"exim": Ansible(settings, folder / "infra/ansible", hosts.variables), "catcher": Starter(settings)},
        Accounts(engine, settings, _other_accounts(engine, settings)),
        ByHand(settings),
        Keys(engine),
        {"exim": speaks, "catcher": speaks},
        Archive.of(settings.server.log_archive),
    )


def _other_accounts(engine: sa.Engine, settings: Settings) -> Sequence[tuple[str, OtherAccounts]]:
    """Of a centre with a broker: there, and where Dagster keeps runs and workers keep results."""
    found: list[tuple[str, OtherAccounts]] = []
    broker = urlsplit(settings.broker.url or "")
    if broker.scheme in ("amqp", "amqps"):
        found.append(("broker", BrokerAccounts(broker.path.strip("/") or "/")))
    urls = [os.environ.get("DAGSTER_MYSQL_URL", ""), (settings.broker.results or "").removeprefix("db+")]
    schemas = [sa.make_url(url).database for url in urls if url.startswith("mysql")]
    if is_mysql(engine) and any(schemas):
        found.append(("storage", StorageAccounts(engine, [schema for schema in schemas if schema])))
    return found


class Provisioning(dg.ConfigurableResource):
    """Making and removing servers, and how many more are wanted."""

    def parts(self, engine: sa.Engine, settings: Settings) -> Parts:
        return parts_of(engine, settings)

    def wanted(self, engine: sa.Engine, settings: Settings) -> Sequence[Wanted]:
        """What the capacity plan orders now, for each pool."""
        return ()
