"""A centre and a dispatch server as `infra/ansible` makes them of bare hosts, by SSH: what an operator, a server and a stranger find there, a campaign
that arrives outside, another version, the one before, and nothing.

In the order of the file: the last ones change the server, and then take it off.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dkim
import pytest

from tests.infra.installing import BOUNCES, CENTRE, DATABASE, PUBLIC, ROOT, SECRETS, SERVER, Installation, Play, with_any_of
from tests.infra.machine import Machine
from tests.parts.processes import wait_for

# Two whole installations at a time would be too much for two processors.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800), pytest.mark.xdist_group("machines")]

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
        with tasks.make_app(settings).connection_for_read(connect_timeout=60) as connection:
            connection.ensure_connection(max_retries=1, timeout=60)
        print("connected")
    except Exception as error:
        print(error)
"""


SEGMENT = "{key: readers, name: Readers, criteria: {in_list: news}}"
CAMPAIGN = """
name: Spring
segments: {include: [readers]}
unsubscribe: all
content:
  from_name: Shop
  from_address: news@shop.test
  subject: Spring is here
  body: |
    <p>Dear reader, <a href="{{ unsubscribe_url }}">Unsubscribe</a></p>
"""


def secrets_of(installation: Installation) -> set[str]:
    """Everything that must not be seen: what the hosts have made for themselves."""
    found = installation.database.run("sh", "-c", "cat /etc/mail-pipelines/database/*").stdout.split()
    found += installation.centre.run("sh", "-c", "cd /etc/mail-pipelines && cat broker broker.accounts operator.password").stdout.split()
    found += installation.centre.run("sh", "-c", f"cat {SECRETS}/*_key {SECRETS}/servers/mx1.[bpt]*").stdout.split()
    assert len(found) == 11
    return set(found)


def password(installation: Installation, schema: str = "mail") -> str:
    return installation.database.run("cat", f"/etc/mail-pipelines/database/{schema}").stdout.strip()


def test_no_secret_is_in_what_the_playbooks_say_or_in_a_file_that_others_may_read(installed: Installation, first_play: Play) -> None:
    secrets = secrets_of(installed)
    assert [secret for secret in secrets if secret in first_play.output] == []
    for machine in (installed.database, installed.centre, installed.server):
        assert with_any_of(machine, secrets, "-perm", "/o+r") == []


def test_a_server_has_its_own_secrets_and_no_others(installed: Installation) -> None:
    own = set(installed.centre.run("sh", "-c", f"cat {SECRETS}/servers/mx1.*").stdout.split())
    assert with_any_of(installed.server, secrets_of(installed) - own) == []
    assert with_any_of(installed.server, own & secrets_of(installed)) == ["/etc/mail-pipelines/environment", "/var/lib/mail-pipelines/secrets/token_key"]


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
    assert not {path.name for path in (ROOT / "infra/ansible/roles").glob("*/files/*")} & set(shipped)


def test_nothing_is_wrong_and_no_unit_has_failed(installed: Installation) -> None:
    said: list[str] = []

    def is_well() -> bool:
        """Which a server that a busy machine has kept from beating is not."""
        said[:] = installed.centre.run("mail-pipelines", "doctor", check=False).stdout.splitlines()
        return [line for line in said if not line.startswith(" ")] == ["nothing is wrong"]

    wait_for(is_well, what=lambda: f"an end of {said}")
    for machine in (installed.database, installed.centre, installed.server):
        assert machine.run("systemctl", "--failed", "--plain", "--no-legend").stdout == ""


def test_the_first_operator_finds_dagster_behind_the_proxy_and_a_stranger_does_not(installed: Installation) -> None:
    login = installed.centre.run("cat", "/etc/mail-pipelines/operator.password").stdout.strip()
    code = (
        "import base64, json, ssl, sys, urllib.error, urllib.request as r\n"
        "for login in json.load(sys.stdin):\n"
        f"    asked = r.Request('https://{PUBLIC}/dagster/graphql', b'{{\"query\": \"{{version}}\"}}', {{'Content-Type': 'application/json',"
        " 'Authorization': 'Basic ' + base64.b64encode(login.encode()).decode()})\n"
        "    try:\n"
        f"        print(r.urlopen(asked, context=ssl.create_default_context(cafile={CA!r})).read().decode())\n"
        "    except urllib.error.HTTPError as error:\n"
        "        print(error.code)\n"
    )
    answers = installed.centre.run("python3", "-c", code, text=json.dumps([f"operator:{login}", "operator:guess"])).stdout.splitlines()
    assert json.loads(answers[0])["data"]["version"]
    assert answers[1] == "401"


# Prints the ports of a host that can be connected to. The time is the kernel's alone, which answers whatever stands still on either host.
REACH = """
import socket, sys
from concurrent.futures import ThreadPoolExecutor

def reached(port):
    try:
        socket.create_connection((sys.argv[1], port), 3).close()
    except OSError:
        return
    sys.stdout.write(f"{port}\\n")

with ThreadPoolExecutor() as threads:
    list(threads.map(reached, map(int, sys.argv[2:])))
"""


def reachable(machine: Machine, ports: Iterable[int]) -> set[int]:
    """Those of the server's ports that can be reached from there."""
    return set(map(int, machine.run("python3", "-c", REACH, SERVER, *map(str, ports)).stdout.split()))


def test_a_server_is_open_for_logins_and_to_the_centre_for_its_numbers(installed: Installation) -> None:
    assert reachable(installed.centre, (22, 25, 2525, 9466)) == {22, 9466}
    assert reachable(installed.database, (22, 2525, 9466)) == {22}
    assert reachable(installed.server, (2525,)) == set()
    assert "127.0.0.1:2525" in installed.server.run("ss", "-Hltn").stdout


def test_a_host_lets_nobody_in_by_password_keeps_the_time_and_updates_itself(installed: Installation) -> None:
    logins = {"passwordauthentication no", "kbdinteractiveauthentication no", "permitrootlogin without-password"}
    assert logins <= set(installed.server.run("/usr/sbin/sshd", "-T").stdout.splitlines())
    updates = installed.server.run("apt-config", "dump").stdout
    assert 'APT::Periodic::Unattended-Upgrade "1";' in updates
    assert "label=Debian-Security" in updates
    # They begin with the host, each time; that a clock is not set in a container is no matter here.
    units = ["apt-daily-upgrade.timer", "nftables.service", "systemd-timesyncd.service"]
    assert installed.server.run("systemctl", "is-enabled", *units).stdout.split() == ["enabled"] * 3


def test_a_campaign_goes_out_by_the_server_signed_with_its_own_key(installed: Installation) -> None:
    """By daemon, broker and workers; from the server's own address and by its own name; encrypted, since the exchanger offers it."""
    said = installed.commands("domain add shop.test")
    installed.world.publish(*(line for line in said.splitlines() if " IN " in line))
    for name, text in {"people.csv": "email\nann@people.test\n", "readers.yaml": SEGMENT, "spring.yaml": CAMPAIGN}.items():
        installed.centre.run("sh", "-c", 'cat >"/tmp/$0"', name, text=text)
    installed.commands(
        "domain check shop.test",
        "contact import /tmp/people.csv --list news",
        "segment refresh",
        "segment save /tmp/readers.yaml",
        "campaign import /tmp/spring.yaml",
        "campaign start spring",
    )
    ((how, message),) = wait_for(installed.world.mail, seconds=600, what=lambda: f"the mail: {installed.commands('campaign status spring', 'server show mx1')}")
    assert how == f"TLS {installed.server.host.address} {SERVER}"
    asked: list[str] = []

    def text_of(name: bytes, timeout: int = 5) -> bytes | None:
        asked.append(name.decode())
        return installed.world.zone.text(name)

    assert dkim.verify(message, dnsfunc=text_of)
    own = re.search(r"^key (\S+): active, .* for server mx1$", installed.commands("domain show shop.test").replace("; key", "key"), re.M)
    assert own is not None
    assert asked == [f"{own[1]}._domainkey.shop.test."]
    assert b"List-Unsubscribe-Post" in message


def test_the_journal_is_rotated_and_goes_on(installed: Installation) -> None:
    installed.server.run("logrotate", "--force", "/etc/logrotate.d/mail-pipelines")
    rotated = installed.server.run("sh", "-c", "cd /var/log/mail-pipelines/mx1 && stat --format '%n %U' main.log main.log.1").stdout
    assert rotated.splitlines() == ["main.log mail-pipelines", "main.log.1 mail-pipelines"]
    assert "OnCalendar=hourly" in installed.server.run("systemctl", "cat", "logrotate.timer").stdout


def test_a_second_run_changes_nothing_after_all_that_and_a_check_run_finds_nothing_to_change(installed: Installation) -> None:
    """Both at a time: where there is nothing to do, they only look."""
    with ThreadPoolExecutor() as threads:
        plays = list(threads.map(lambda options: installed.play("site.yml", *options), [(), ("--check",)]))
    for play in plays:
        assert (play.status, play.failed, play.changed) == ("successful", [], []), play.output


def test_the_play_fails_for_a_server_that_cannot_send(installed: Installation) -> None:
    installed.server.run("systemctl", "stop", "mail-pipelines-control")
    # All else is well within it.
    play = installed.play("server.yml", "--tags", "health", health_seconds=15)
    assert play.status == "failed"
    (failed,) = play.failed
    assert "no worker reads queue mx1-ctl" in failed


def test_the_play_fails_where_another_program_has_the_port_of_exim(installed: Installation) -> None:
    server = installed.server
    server.run("systemctl", "stop", "mail-pipelines-exim")
    server.run("systemd-run", "--unit", "other", "python3", "-m", "http.server", "--bind", "127.0.0.1", "2525")
    wait_for(lambda: "127.0.0.1:2525" in server.run("ss", "-Hltn").stdout, what="the other program")
    server.run("systemctl", "start", "mail-pipelines-exim")
    play = installed.play("server.yml", "--tags", "health", health_seconds=1)
    server.run("systemctl", "stop", "other")
    assert play.status == "failed"
    (failed,) = play.failed
    assert "no Exim answers at port 2525, that of server mx1" in failed


@pytest.fixture(scope="module")
def newer(installed: Installation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another version of the checkout, without Git, as it is where it was installed."""
    # What the centre does by itself would take half of the processor meanwhile.
    installed.centre.run("systemctl", "stop", *(f"mail-pipelines-{unit}" for unit in ("daemon", "web", "viewer", "code", "centre-worker", "metrics")))
    folder = tmp_path_factory.mktemp("newer")
    for name in subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    with (folder / "README.md").open("a", encoding="utf-8") as readme:
        readme.write("Newer.\n")
    return folder


def runs(installed: Installation) -> str:
    """The last line of the README that the server's units were started with."""
    pid = installed.server.run("systemctl", "show", "--property", "MainPID", "--value", "mail-pipelines-worker").stdout.strip()
    return installed.server.run("tail", "-n", "1", f"/proc/{pid}/cwd/README.md").stdout.strip()


UPGRADE = [
    f"{SERVER}: Nothing of the one before the last stays but its environment",
    f"{SERVER}: Files",
    f"{SERVER}: Python packages as requirements.lock has them",
]
SWITCH, RESTART = f"{SERVER}: It takes the place of the one that runs", f"{SERVER}: Restart each"


def test_another_version_and_new_passwords_come_by_the_same_command(installed: Installation, newer: Path) -> None:
    before = installed.server.run("cat", "/etc/mail-pipelines/environment").stdout
    installed.commands("server account mx1")
    installed.centre.run("rm", f"{SECRETS}/servers/mx1.broker")
    play = installed.play("server.yml", checkout=newer)
    assert (play.status, play.failed) == ("successful", []), play.output
    # Ansible says nothing of tasks that handle secrets, such as that of the environment, but for what they have restarted.
    made = [f"{CENTRE}: Passwords for the broker, of the first server of each host", f"{CENTRE}: Accounts at the broker"]
    assert play.changed == [*made, *UPGRADE, SWITCH, RESTART]
    assert runs(installed) == "Newer."
    now = installed.server.run("cat", "/etc/mail-pipelines/environment").stdout
    assert sorted(line.split("=")[0] for line in set(before.splitlines()) ^ set(now.splitlines())) == sorted(
        2 * ["DAGSTER_MYSQL_URL", "MAIL_PIPELINES_BROKER__RESULTS", "MAIL_PIPELINES_BROKER__URL", "MAIL_PIPELINES_DATABASE__PASSWORD"]
    )


def test_one_variable_brings_the_former_version_back(installed: Installation, newer: Path) -> None:
    play = installed.play("server.yml", checkout=newer, platform_release="previous")
    assert (play.status, play.failed, play.changed) == ("successful", [], [SWITCH, RESTART]), play.output
    assert runs(installed) != "Newer."


def test_a_host_is_bare_again(installed: Installation) -> None:
    # What these tests have put there stands in the way.
    installed.server.run("umount", "/opt/mail-pipelines-1/.venv", "/opt/mail-pipelines-2/.venv")
    play = installed.play("remove.yml")
    assert (play.status, play.failed) == ("successful", []), play.output
    left = installed.server.run("sh", "-c", "ls -d /etc/mail-pipelines /etc/*/mail-pipelines* /var/*/mail-pipelines /run/mail-pipelines", check=False).stdout
    assert left == ""
    assert (
        installed.server.run(
            "sh", "-c", "id mail-pipelines; systemctl list-units --plain --no-legend 'mail-pipelines-*'; which exim4; nft list tables", check=False
        ).stdout
        == ""
    )
    again = installed.play("remove.yml")
    assert (again.status, again.failed, again.changed) == ("successful", [], []), again.output
