"""What the account of a stolen server can do at the broker: nothing beyond its own queues."""

from __future__ import annotations

import amqp
import pytest
from kombu import Connection, Exchange, Queue

from mail_pipelines.resources import orders, tasks
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
