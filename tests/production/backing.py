"""What a fleet stands on: a folder and SQLite, or RabbitMQ and MariaDB with an account for each host."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.benchmarks.rabbitmq import RabbitMQ
from mail_pipelines.dispatch import accounts
from mail_pipelines.resources import server_storage
from mail_pipelines.resources.broker_accounts import rights
from tests.parts.processes import free_port
from tests.production.fleet import SERVERS, dagster_yaml

_ACCOUNT = "dagster"
_PASSWORD = "p@ss/word:1"
# A server that nothing else needs.
SPARE = "spare"


@dataclass
class Backing:
    """`environ` of the centre, and what differs on each server."""

    environ: dict[str, str]
    of_server: dict[str, dict[str, str]] = field(default_factory=dict)
    broker: RabbitMQ | None = None
    database: MariaDB | None = None

    def give_accounts(self, engine: sa.Engine) -> None:
        """Each registered server gets its own account of the databases, where there are any."""
        if self.database is None:
            return
        for name, environ in self.of_server.items():
            given = accounts.give(engine, name)
            environ |= {"MAIL_PIPELINES_DATABASE__URL": given.url, "MAIL_PIPELINES_DATABASE__PASSWORD": given.password}
            environ |= server_storage.give(engine, config.load(), given)


def filesystem(folder: Path, stack: ExitStack) -> Backing:
    """No server at all."""
    dagster_yaml(folder / "home", embedded=True)
    results = folder / "results"
    results.mkdir()
    return Backing({"MAIL_PIPELINES_BROKER__URL": f"filesystem://{folder}/broker", "MAIL_PIPELINES_BROKER__RESULTS": f"file://{results}"})


def rabbitmq(folder: Path, stack: ExitStack) -> Backing:
    """As in production."""
    dagster_yaml(folder / "home", embedded=False)
    # Both are killed and started again, at the same ports.
    database = MariaDB(folder / "mariadb", free_port(), options=("--max-connections=400",))
    database.folder.mkdir()
    database.start()
    stack.callback(database.stop)
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.execute("CREATE DATABASE dagster CHARACTER SET utf8mb4")
        cursor.execute("CREATE USER %s@'127.0.0.1' IDENTIFIED BY %s", (_ACCOUNT, _PASSWORD))
        cursor.execute("GRANT ALL ON dagster.* TO %s@'127.0.0.1'", (_ACCOUNT,))
    ports = {name: free_port() for name in ("port", "management_port", "_mapper_port")}
    broker = RabbitMQ(folder, {name: rights(name) for name in SERVERS}, management=True, **ports)
    stack.callback(broker.stop)
    broker.start()
    results = database.database()
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.execute("CREATE USER results@'127.0.0.1'")
        cursor.execute(f"GRANT ALL ON {results.rpartition('/')[2]}.* TO results@'127.0.0.1'")
    environ = {
        "MAIL_PIPELINES_DATABASE__URL": database.database(),
        "MAIL_PIPELINES_BROKER__URL": broker.url("centre"),
        "MAIL_PIPELINES_BROKER__MANAGEMENT_URL": broker.management_url,
        "MAIL_PIPELINES_BROKER__RESULTS": f"db+{results.replace('root@', 'results@')}",
        "DAGSTER_MYSQL_URL": f"mysql+pymysql://{_ACCOUNT}:{quote(_PASSWORD, safe='')}@127.0.0.1:{database.port}/dagster?ssl_disabled=true",
    }
    return Backing(environ, {name: {"MAIL_PIPELINES_BROKER__URL": broker.url(name)} for name in SERVERS}, broker, database)


# In this order: pytest puts tests with the same number of a parameter together, and files that want only the first have that one as theirs.
BACKINGS = {"rabbitmq": rabbitmq, "filesystem": filesystem}
