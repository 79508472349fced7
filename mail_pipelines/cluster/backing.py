"""What the cluster stands on: MariaDB and RabbitMQ of its own, with the centre's account at both, and one at the broker for each server, as
docs/production.md has them. The centre makes those of its servers at the database.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.benchmarks.rabbitmq import RabbitMQ
from mail_pipelines.resources.broker_accounts import rights

CENTRE = "centre"
SCHEMAS = ("mail", "dagster", "results")
# Each host has some processes with a few connections each.
_CONNECTIONS = 400
_MAKE_SCHEMA = {name: f"CREATE DATABASE {name} CHARACTER SET utf8mb4" for name in SCHEMAS}
_OF_CENTRE = (
    *(f"GRANT ALL ON `{name}`.* TO %s@'127.0.0.1' WITH GRANT OPTION" for name in (*SCHEMAS, r"mail\_servers", r"dagster\_servers")),
    "GRANT CREATE USER, PROCESS, CONNECTION ADMIN ON *.* TO %s@'127.0.0.1'",
)


@dataclass(frozen=True)
class Backing:
    """Where database, broker and Dagster's storage are, as the centre's environment says it, and the broker as each server's does, by its name."""

    centre: Mapping[str, str]
    of_server: Mapping[str, Mapping[str, str]]


def start(folder: Path, servers: Sequence[str], stack: ExitStack) -> Backing:
    """Start both in `folder`; they are stopped when the stack is left. The tables are still to be made."""
    database = MariaDB(folder / "mariadb", options=(f"--max-connections={_CONNECTIONS}",))
    broker = RabbitMQ(folder / "rabbitmq", {name: rights(name) for name in servers})
    for part in (database, broker):
        part.folder.mkdir(mode=0o700)
        stack.callback(part.stop)
    with ThreadPoolExecutor() as both:
        # Each waits for most of its time.
        for started in [both.submit(part.start) for part in (database, broker)]:
            started.result()
    password = secrets.token_hex(16)
    with database.connect() as connection, connection.cursor() as cursor:
        for schema in SCHEMAS:
            cursor.execute(_MAKE_SCHEMA[schema])
        cursor.execute("CREATE USER %s@'127.0.0.1' IDENTIFIED BY %s", (CENTRE, password))
        for statement in _OF_CENTRE:
            cursor.execute(statement, (CENTRE,))
    at = f"{CENTRE}:{password}@127.0.0.1:{database.port}"
    # Else PyMySQL would get ready for TLS at each connection, and Dagster makes one for each query.
    plain = "?ssl_disabled=true"
    environ = {
        "MAIL_PIPELINES_DATABASE__URL": f"mysql+pymysql://{at}/mail{plain}",
        "MAIL_PIPELINES_BROKER__RESULTS": f"db+mysql+pymysql://{at}/results{plain}",
        "DAGSTER_MYSQL_URL": f"mysql+pymysql://{at}/dagster{plain}",
    }
    brokers = {name: {"MAIL_PIPELINES_BROKER__URL": broker.url(name)} for name in (CENTRE, *servers)}
    return Backing(environ | brokers.pop(CENTRE), brokers)
