"""A centre as `infra/ansible/centre.yml` makes it of two bare hosts, by SSH: what an operator, a server and a stranger find there, and a run that
Dagster executes. `script/centre`: it takes minutes of the processor, so no other command runs it.
"""

from __future__ import annotations

import json
import re

import pytest

from tests.infra.installing import BOUNCES, CENTRE, DATABASE, PUBLIC, ROOT, Installation, Play
from tests.infra.machine import Machine
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

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


LAUNCH = """mutation { launchRun(executionParams: {
  selector: {repositoryLocationName: "mail_pipelines", repositoryName: "__repository__", jobName: "maintenance"}, mode: "default"
}) { ... on LaunchRunSuccess { run { runId } } } }"""
STATUS = '{ runOrError(runId: "%s") { ... on Run { status } } }'


def secrets_of(installation: Installation) -> set[str]:
    """Everything that must not be seen: what both hosts have made for themselves."""
    found = installation.database.run("sh", "-c", "cat /etc/mail-pipelines/database/*").stdout.split()
    found += installation.centre.run("cat", "/etc/mail-pipelines/broker", "/etc/mail-pipelines/operator.password").stdout.split()
    found += installation.centre.run("sh", "-c", "cat /var/lib/mail-pipelines/secrets/*").stdout.split()
    assert len(found) == 7
    return set(found)


def password(installation: Installation, schema: str = "mail") -> str:
    return installation.database.run("cat", f"/etc/mail-pipelines/database/{schema}").stdout.strip()


def test_a_second_run_changes_nothing(installed: Installation) -> None:
    again = installed.play()
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


def graphql(centre: Machine, query: str) -> dict[str, dict[str, object]]:
    """Ask Dagster through the proxy as the first operator, whose password goes by standard input."""
    login = centre.run("cat", "/etc/mail-pipelines/operator.password").stdout.strip()
    code = (
        "import base64, json, ssl, sys, urllib.request as r\n"
        "query, login, ca = json.load(sys.stdin)\n"
        f"asked = r.Request('https://{PUBLIC}/dagster/graphql', json.dumps({{'query': query}}).encode(), {{'Content-Type': 'application/json',"
        " 'Authorization': 'Basic ' + base64.b64encode(f'operator:{login}'.encode()).decode()})\n"
        "print(r.urlopen(asked, context=ssl.create_default_context(cafile=ca)).read().decode())"
    )
    answer = centre.run("python3", "-c", code, text=json.dumps([query, login, CA]))
    data: dict[str, dict[str, object]] = json.loads(answer.stdout)["data"]
    return data


def test_doctor_misses_only_servers_and_no_unit_has_failed(installed: Installation) -> None:
    said = installed.centre.run("mail-pipelines", "doctor", check=False).stdout.splitlines()
    assert [line for line in said if not line.startswith(" ")] == ["servers: no dispatch server is active: nothing can be sent"]
    assert installed.centre.run("systemctl", "--failed", "--plain", "--no-legend").stdout == ""


def test_a_run_goes_through_daemon_broker_and_worker(installed: Installation) -> None:
    started = graphql(installed.centre, LAUNCH)["launchRun"]["run"]
    assert isinstance(started, dict)
    run_id = str(started["runId"])
    ended = wait_for(
        lambda: status if (status := graphql(installed.centre, STATUS % run_id)["runOrError"]["status"]) in ("SUCCESS", "FAILURE") else None,
        seconds=90,
        what="the end of the run",
    )
    assert ended == "SUCCESS"
