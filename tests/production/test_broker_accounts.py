"""Accounts of servers at RabbitMQ: the centre makes and ends them by its management API, as whoever it runs as, and says what is wrong where it cannot."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import amqp
import pytest
from kombu import Connection

from mail_pipelines import config
from mail_pipelines.benchmarks.rabbitmq import MANAGER, VHOST, RabbitMQ
from mail_pipelines.dispatch import registry, servers
from mail_pipelines.doctor.broker import check_broker
from mail_pipelines.free_ports import free_port
from mail_pipelines.home import checkout
from mail_pipelines.resources.broker_accounts import BrokerAccountError, BrokerAccounts
from tests.parts.processes import wait_for
from tests.production.fleet import SERVERS, Fleet

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("centre"),
    # A broker of files knows no accounts.
    pytest.mark.parametrize("fleet", ["rabbitmq"], indirect=True),
]
OTHER = SERVERS[1]
NOBODY = 65534


@pytest.fixture
def broker(fleet: Fleet) -> RabbitMQ:
    assert fleet.backing.broker is not None
    return fleet.backing.broker


@pytest.fixture
def accounts(broker: RabbitMQ) -> BrokerAccounts:
    """As the centre has them."""
    return BrokerAccounts(config.load().broker)


def connection(broker: RabbitMQ, account: str, password: str) -> Connection:
    return Connection(f"amqp://{account}:{password}@127.0.0.1:{broker.port}/{VHOST}")


def test_an_account_is_made_for_a_new_server_and_given_another_password(broker: RabbitMQ, accounts: BrokerAccounts) -> None:
    """As provisioning does it, each time it plays on the host: the last password counts, and its own queues are all it has."""
    accounts.check()
    for password in ("first-password", "second-password"):
        accounts.put("mx9", password)
    with connection(broker, "mx9", "second-password") as own:
        own.default_channel.queue_declare("mx9-ctl")
        own.default_channel.queue_delete("mx9-ctl")
        with pytest.raises(amqp.AccessRefused):
            own.default_channel.queue_declare(OTHER)
    with pytest.raises(amqp.AccessRefused), connection(broker, "mx9", "first-password") as old:
        old.connect()
    accounts.delete("mx9")


def test_an_account_ends_with_its_open_connections(broker: RabbitMQ, accounts: BrokerAccounts) -> None:
    accounts.put("mx9", "a-password")
    with connection(broker, "mx9", "a-password") as stolen:
        stolen.connect()
        accounts.delete("mx9")
        # Repeating it does no harm.
        accounts.delete("mx9")
        wait_for(lambda: _is_closed(stolen), what="the end of the open connection")
    with pytest.raises(amqp.AccessRefused), connection(broker, "mx9", "a-password") as again:
        again.connect()


def test_another_password_takes_no_rights_away(broker: RabbitMQ, accounts: BrokerAccounts) -> None:
    """The first server of a host with several has been given the queues of all by the playbook."""
    of_both = dict.fromkeys(("configure", "write", "read"), "^(mx8|mx9)$")
    accounts.put("mx8", "first-password")
    own_alone = r"^(dispatch|mx8(-ctl)?|mx8\.pidbox|mx8(-ctl)?@.*)$"
    assert accounts._ask("GET", "permissions", VHOST, "mx8") == {"user": "mx8", "vhost": VHOST} | dict.fromkeys(of_both, own_alone)
    accounts._ask("PUT", "permissions", VHOST, "mx8", body=of_both)
    accounts.put("mx8", "second-password")
    with connection(broker, "mx8", "second-password") as own:
        own.default_channel.queue_declare("mx9")
        own.default_channel.queue_delete("mx9")
    accounts.delete("mx8")


@pytest.mark.parametrize("account", ["centre", MANAGER])
def test_the_centres_own_accounts_are_no_servers(accounts: BrokerAccounts, account: str) -> None:
    for change in (lambda: accounts.put(account, "a-password"), lambda: accounts.delete(account)):
        with pytest.raises(BrokerAccountError, match="the centre's own account"):
            change()
    accounts.check()


def test_what_is_wrong_is_said_with_what_to_do(broker: RabbitMQ) -> None:
    url = urlsplit(broker.management_url)
    for given, words in {
        "": "broker.management_url is not set",
        "http://user:word@127.0.0.1": "not of the form",
        "http://user:word@127.0.0.1:port": "not of the form",
        "127.0.0.1:15672": "not of the form http://USER:PASSWORD@127.0.0.1:15672",
        broker.management_url.replace("127.0.0.1", "192.0.2.1"): "has to begin with https://",
        broker.management_url.replace(str(broker.management_port), str(free_port())): "rabbitmq-plugins enable rabbitmq_management",
        broker.management_url.replace(str(broker.management_port), str(broker.port)): "rabbitmq-plugins enable rabbitmq_management",
        f"http://{MANAGER}:guess@{url.hostname}:{url.port}": f"rabbitmqctl change_password {MANAGER}",
        broker.management_url.replace(MANAGER, "centre"): "rabbitmqctl set_user_tags centre administrator",
        f"{broker.management_url}/cli": "is not RabbitMQ's management API|look whether broker.url",
    }.items():
        asked = BrokerAccounts(config.BrokerSettings(url=broker.url("centre"), management_url=given))
        for ask in (asked.check, lambda asked=asked: asked.put("mx9", "a-password"), lambda asked=asked: asked.delete("mx9")):
            with pytest.raises(BrokerAccountError, match=words) as error:
                ask()
            assert "guess" not in str(error.value)
            assert str(url.password) not in str(error.value)


def test_a_virtual_host_that_is_not_there_is_named(broker: RabbitMQ, accounts: BrokerAccounts) -> None:
    elsewhere = BrokerAccounts(accounts.settings.model_copy(update={"url": f"{broker.url('centre')}-2"}))
    with pytest.raises(BrokerAccountError, match="its virtual host is there"):
        elsewhere.put("mx9", "a-password")
    accounts.delete("mx9")


def test_doctor_names_an_api_that_does_not_answer_and_a_server_that_has_its_password(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> list[str]:
        return [finding.problem for finding in check_broker(config.load())]

    assert found() == []
    own = fleet.platform.environ["MAIL_PIPELINES_BROKER__MANAGEMENT_URL"]
    monkeypatch.setenv("MAIL_PIPELINES_BROKER__MANAGEMENT_URL", f"http://{MANAGER}:secret@127.0.0.1:{free_port()}")
    (problem,) = found()
    assert problem.startswith("RabbitMQ's management API does not answer")
    assert "secret" not in problem
    for name, value in fleet.environ(OTHER).items():
        monkeypatch.setenv(name, value)
    assert found() == []
    monkeypatch.setenv("MAIL_PIPELINES_BROKER__MANAGEMENT_URL", own)
    (problem,) = found()
    assert problem.startswith("broker.management_url is set on a server")


def test_a_user_without_any_privileges_makes_and_revokes_a_server(fleet: Fleet, broker: RabbitMQ) -> None:
    """As the units of the centre are: systemd starts them with NoNewPrivileges, and no user but root may run RabbitMQ's own commands."""
    name, engine = "unprivileged", fleet.platform.engine
    servers.register(engine, name, kind="exim", host="127.0.0.1", port=28, now=dt.datetime.now(dt.UTC))
    # Not below the folders of the tests, which are their user's alone.
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, NOBODY, NOBODY)
        given = {"MAIL_PIPELINES_HOME": folder, "MAIL_PIPELINES_SENDING__TOKEN_KEY": fleet.platform.settings.token_key().decode()}
        environ = {**fleet.platform.environ, **given}
        _as_nobody(environ, "server", "account", name)
        password = (Path(folder) / "secrets/servers" / f"{name}.broker").read_text(encoding="utf-8").strip()
        with connection(broker, name, password) as own:
            own.connect()
            said = _as_nobody(environ, "server", "revoke", name)
            assert "its account at the broker is deleted" in said
            wait_for(lambda: _is_closed(own), what="the end of the open connection")
        assert list((Path(folder) / "secrets/servers").iterdir()) == []
    with engine.connect() as connected:
        assert servers.find(connected, name).state == registry.ServerState.RETIRED


def _as_nobody(environ: Mapping[str, str], *words: str) -> str:
    """What `mail-pipelines` says as a user who may do nothing, and can become nobody else, but read this interpreter, wherever it lies."""
    reading = [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient")]
    become = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs", *reading]
    status = ["sh", "-c", 'grep -q "^NoNewPrivs:[[:space:]]*1" /proc/self/status && [ "$(id -u)" = 65534 ] && exec "$@"', "sh"]
    command = ["setpriv", *become, *status, sys.executable, "-m", "mail_pipelines", *words]
    done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=120, cwd=checkout())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _is_closed(connection: Connection) -> bool:
    """Whether the broker has ended a connection."""
    try:
        connection.drain_events(timeout=0.1)
    except TimeoutError:
        return False
    except (amqp.ConnectionForced, OSError):
        return True
    return False
