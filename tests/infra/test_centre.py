"""A centre as `infra/ansible/centre.yml` makes it of two bare hosts, by SSH: what an operator, a server and a stranger find there."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.infra.installing import BOUNCES, CENTRE, DATABASE, PUBLIC, ROOT, Installation, Play

# Of one process, since each of several would make machines of its own.
pytestmark = [pytest.mark.server, pytest.mark.xdist_group("platform"), pytest.mark.timeout(600)]

CA = "/etc/mail-pipelines/tls/ca.pem"
# As any client of the database would: with TLS, and without.
CONNECT = """
import pymysql, sys
for options in ({"ssl_ca": sys.argv[3]}, {"ssl_disabled": True}):
    try:
        pymysql.connect(host=sys.argv[1], user="mail", password=sys.argv[2], **options)
        print("connected")
    except pymysql.err.OperationalError as error:
        print(error.args[0])
"""
# A worker's connection to the broker, trusting the installation's authority, and those of the host.
ASK_BROKER = """
import os, sys
from mail_pipelines import config
from mail_pipelines.resources import tasks
for authority in (sys.argv[1], ""):
    settings = config.load({**os.environ, "MAIL_PIPELINES_BROKER__CA": authority})
    try:
        with tasks.make_app(settings).connection_for_read() as connection:
            connection.ensure_connection(max_retries=1, timeout=5)
        print("connected")
    except Exception as error:
        print(error)
"""


def secrets_of(installation: Installation) -> set[str]:
    """Everything that must not be seen: what both hosts have made for themselves."""
    found = installation.database.run("sh", "-c", "cat /etc/mail-pipelines/database/*").stdout.split()
    found += installation.centre.run("cat", "/etc/mail-pipelines/broker", "/etc/mail-pipelines/operator.password").stdout.split()
    found += installation.centre.run("sh", "-c", "cat /var/lib/mail-pipelines/secrets/*").stdout.split()
    assert len(found) == 7
    return set(found)


def password(installation: Installation, schema: str = "mail") -> str:
    return installation.database.run("cat", f"/etc/mail-pipelines/database/{schema}").stdout.strip()


def test_a_second_run_changes_nothing(installed: Installation, variables: dict[str, Any]) -> None:
    again = installed.play(**variables)
    assert (again.status, again.failed, again.changed) == ("successful", [], []), again.output


def test_no_secret_is_in_what_the_playbook_says(installed: Installation, first_play: Play) -> None:
    assert [secret for secret in secrets_of(installed) if secret in first_play.output] == []


def test_the_database_lets_nobody_in_without_tls(installed: Installation) -> None:
    words = ["/opt/mail-pipelines/.venv/bin/python", "-c", CONNECT, DATABASE, password(installed), CA]
    # 1045: refused; 3159: the server wants TLS.
    with_tls, without = installed.centre.run(*words).stdout.split()
    assert with_tls == "connected"
    assert without in ("1045", "3159")
    account = installed.database.run("mariadb", "--execute", "SHOW CREATE USER mail@'%'").stdout
    assert "REQUIRE SSL" in account


@pytest.mark.parametrize(("port", "options"), [(5671, []), (25, ["-starttls", "smtp"]), (443, ["-servername", PUBLIC])])
def test_broker_mail_and_proxy_show_a_certificate_that_verifies(installed: Installation, port: int, options: list[str]) -> None:
    name = {5671: CENTRE, 25: BOUNCES, 443: PUBLIC}[port]
    verify = ["-CAfile", CA, "-verify_hostname", name, "-verify_return_error"]
    # From the other host.
    installed.database.run("openssl", "s_client", "-connect", f"{CENTRE}:{port}", *options, *verify, text="QUIT\n")


def test_a_server_speaks_with_the_broker_by_tls_alone(installed: Installation) -> None:
    listening = installed.centre.run("ss", "-Hltn").stdout
    assert sorted(set(re.findall(r"(?<=\s)(?:0\.0\.0\.0|\*|\[::\]):(\d+)", listening))) == ["22", "25", "443", "5671"]
    secret = installed.centre.run("cat", "/etc/mail-pipelines/broker").stdout.strip()
    words = ["env", "--chdir=/opt/mail-pipelines", "MAIL_PIPELINES_HOME=/nowhere", "MAIL_PIPELINES_BROKER__RESULTS=file:///tmp"]
    given = f"MAIL_PIPELINES_BROKER__URL=amqps://centre:{secret}@{CENTRE}:5671/mail"
    trusting, strange = installed.centre.run(*words, given, ".venv/bin/python", "-c", ASK_BROKER, CA).stdout.splitlines()
    assert trusting == "connected"
    # Of an authority that this host does not trust.
    assert "certificate verify failed" in strange


def test_what_infra_has_is_what_is_installed(installed: Installation) -> None:
    """No copies that somebody would have to keep up."""
    shipped = {path.name: path for folder in ("systemd", "rabbitmq", "mariadb", "logrotate", "bin") for path in (ROOT / "infra" / folder).iterdir()}
    for unit in installed.centre.run("sh", "-c", "cd /etc/systemd/system && ls mail-pipelines-*").stdout.split():
        assert installed.centre.run("cat", f"/etc/systemd/system/{unit}").stdout == shipped[unit].read_text(encoding="utf-8")
    assert installed.centre.run("cat", "/etc/rabbitmq/rabbitmq.conf").stdout == shipped["rabbitmq.conf"].read_text(encoding="utf-8")
    assert not list((ROOT / "infra/ansible/roles").glob("*/files"))
