"""What the cluster stands on: MariaDB and RabbitMQ of its own, with an account for each host as docs/production.md has them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.benchmarks.rabbitmq import RabbitMQ, rights

CENTRE = "centre"
SCHEMAS = ("mail", "dagster", "results")
# Each host has some processes with a few connections each.
_CONNECTIONS = 400
_MAKE_SCHEMA = {name: f"CREATE DATABASE {name} CHARACTER SET utf8mb4" for name in SCHEMAS}
_OF_CENTRE = {name: f"GRANT ALL ON {name}.* TO %s@'127.0.0.1'" for name in SCHEMAS}
# No right to make or drop anything.
_OF_SERVER = {name: f"GRANT SELECT, INSERT, UPDATE, DELETE, EXECUTE ON {name}.* TO %s@'127.0.0.1'" for name in SCHEMAS}


@dataclass(frozen=True)
class Backing:
    """The part of each host's environment that says where database, broker and Dagster's storage are, by the host's name."""

    environ: Mapping[str, Mapping[str, str]]


def start(folder: Path, servers: Sequence[str], stack: ExitStack) -> Backing:
    """Start both in `folder`; they are stopped when the stack is left. The tables are still to be made."""
    database = MariaDB(folder / "mariadb", options=(f"--max-connections={_CONNECTIONS}",))
    broker = RabbitMQ(folder / "rabbitmq", {name: rights(name) for name in servers})
    for part in (database, broker):
        part.folder.mkdir(mode=0o700)
        stack.callback(part.stop)
        part.start()
    passwords = {name: secrets.token_hex(16) for name in (CENTRE, *servers)}
    with database.connect() as connection, connection.cursor() as cursor:
        for schema in SCHEMAS:
            cursor.execute(_MAKE_SCHEMA[schema])
        for account, password in passwords.items():
            cursor.execute("CREATE USER %s@'127.0.0.1' IDENTIFIED BY %s", (account, password))
            for schema in SCHEMAS:
                cursor.execute((_OF_CENTRE if account == CENTRE else _OF_SERVER)[schema], (account,))
    return Backing({account: _environ(account, password, database.port, broker.url(account)) for account, password in passwords.items()})


def _environ(account: str, password: str, port: int, broker: str) -> dict[str, str]:
    at = f"mysql+pymysql://{account}:{password}@127.0.0.1:{port}"
    return {
        "MAIL_PIPELINES_DATABASE__URL": f"{at}/mail",
        "MAIL_PIPELINES_BROKER__URL": broker,
        "MAIL_PIPELINES_BROKER__RESULTS": f"db+{at}/results",
        "DAGSTER_MYSQL_URL": f"mysql+mysqlconnector://{account}:{password}@127.0.0.1:{port}/dagster",
    }
