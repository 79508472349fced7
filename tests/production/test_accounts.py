"""What the accounts of a stolen server can do at the broker and in the databases: nothing beyond its own queues and rows.

`tests/dispatch/test_accounts.py` has the rights in the central database one by one.
"""

from __future__ import annotations

import os
from unittest import mock
from urllib.parse import urlsplit

import amqp
import pytest
import sqlalchemy as sa
from kombu import Connection, Exchange, Queue

from mail_pipelines.database.engine import create_engine
from mail_pipelines.resources import broker_accounts, orders, tasks
from tests.parts.processes import wait_for
from tests.production.backing import SPARE
from tests.production.fleet import SERVERS, Fleet

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("platform"),
    # A broker of files knows no accounts.
    pytest.mark.parametrize("fleet", ["rabbitmq"], indirect=True),
]
STOLEN, OTHER = SERVERS


@pytest.mark.parametrize("queue", ["centre", OTHER])
def test_it_orders_nothing_from_others(fleet: Fleet, queue: str) -> None:
    order = orders.sign(orders.Order("run", queue, 2e9), orders.new_signing_key())
    assert fleet.backing.broker is not None
    with Connection(fleet.backing.broker.url(STOLEN), transport_options={"confirm_publish": True}) as connection, pytest.raises(amqp.AccessRefused):
        connection.Producer().publish([order, {}, {}], exchange=queue, routing_key=queue, headers={"task": tasks.EXECUTE_RUN, "id": "1"})


@pytest.mark.parametrize("queue", ["centre", OTHER, f"{OTHER}-ctl"])
def test_it_reads_no_queue_of_others(fleet: Fleet, queue: str) -> None:
    assert fleet.backing.broker is not None
    with Connection(fleet.backing.broker.url(STOLEN)) as connection, pytest.raises(amqp.AccessRefused):
        connection.default_channel.basic_get(queue)


@pytest.mark.parametrize("exchange", ["centre.pidbox", f"{OTHER}.pidbox"])
def test_it_commands_no_worker_of_others(fleet: Fleet, exchange: str) -> None:
    """Neither by writing to the exchange of their commands, nor by listening to it."""
    assert fleet.backing.broker is not None
    with Connection(fleet.backing.broker.url(STOLEN), transport_options={"confirm_publish": True}) as connection, pytest.raises(amqp.AccessRefused):
        connection.Producer().publish({"method": "shutdown", "arguments": {}}, exchange=exchange)
    with Connection(fleet.backing.broker.url(STOLEN)) as connection, pytest.raises(amqp.AccessRefused):
        Queue(STOLEN, Exchange(exchange, "fanout", no_declare=True), no_declare=True)(connection.default_channel).bind_to(exchange)


def test_its_environment_opens_no_address(fleet: Fleet) -> None:
    """With everything in its environment file: no account that reads the central database but its own, which sees its own rows."""
    environ, central = fleet.environ(STOLEN), str(fleet.platform.engine.url.database)
    urls = [sa.make_url(environ["MAIL_PIPELINES_DATABASE__URL"]).set(password=environ["MAIL_PIPELINES_DATABASE__PASSWORD"])]
    urls.append(sa.make_url(environ["MAIL_PIPELINES_BROKER__RESULTS"].removeprefix("db+")))
    urls.append(sa.make_url(environ["DAGSTER_MYSQL_URL"]).set(drivername="mysql+pymysql"))
    for url in urls:
        engine = create_engine(url.render_as_string(hide_password=False))
        for table in ("contacts", "suppressions", "deliveries", "dkim_keys"):
            with pytest.raises(sa.exc.DBAPIError, match="denied"), engine.connect() as connection:
                connection.exec_driver_sql(f"SELECT 1 FROM {central}.{table}")
        engine.dispose()


def test_its_account_at_the_broker_ends_with_its_open_connections(fleet: Fleet) -> None:
    """As `mail-pipelines server revoke` has it; of a server that nothing else needs."""
    broker = fleet.backing.broker
    assert broker is not None
    with Connection(broker.url(SPARE)) as stolen:
        stolen.connect()
        with mock.patch.dict(os.environ, broker.environ):
            broker_accounts.delete(SPARE)
            # Repeating it does no harm.
            broker_accounts.delete(SPARE)
        wait_for(lambda: _is_closed(stolen), what="the end of the open connection")
    with pytest.raises(amqp.AccessRefused), Connection(broker.url(SPARE)) as again:
        again.connect()


def test_an_account_is_made_for_a_new_server_and_given_another_password(fleet: Fleet) -> None:
    """As provisioning does it, each time it plays on the host: the last password counts, and its own queues are all it has."""
    broker = fleet.backing.broker
    assert broker is not None
    url = urlsplit(broker.url(OTHER))
    vhost = url.path.strip("/")

    def connect(password: str) -> Connection:
        return Connection(f"{url.scheme}://mx9:{password}@{url.hostname}:{url.port}/{vhost}")

    with mock.patch.dict(os.environ, broker.environ):
        for password in ("first-password", "second-password"):
            broker_accounts.put("mx9", password, vhost)
        try:
            with connect("second-password") as own:
                own.default_channel.queue_declare("mx9-ctl")
                own.default_channel.queue_delete("mx9-ctl")
                with pytest.raises(amqp.AccessRefused):
                    own.default_channel.queue_declare(OTHER)
            with pytest.raises(amqp.AccessRefused), connect("first-password") as old:
                old.connect()
        finally:
            broker_accounts.delete("mx9")


def _is_closed(connection: Connection) -> bool:
    """Whether the broker has ended a connection."""
    try:
        connection.drain_events(timeout=0.1)
    except TimeoutError:
        return False
    except (amqp.ConnectionForced, OSError):
        return True
    return False
