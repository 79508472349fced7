"""The way of a server, by the parts that an installation has: a plan that lacks one, a proposal, a host installed by Ansible over SSH with its own accounts,
its names in a real DNS, its first heartbeat, and its warm-up.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from mail_pipelines import config
from mail_pipelines.capacity import far, warm_up
from mail_pipelines.capacity.far import FarOrder
from mail_pipelines.cli import app
from mail_pipelines.commands import context as commands
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Provision, Server, SyncState
from mail_pipelines.definitions import build_defs
from mail_pipelines.provisioning import over_ssh, ssh_keys, store, verifying
from mail_pipelines.provisioning.finding import Finding
from mail_pipelines.provisioning.interfaces import Host, Order, ProvisioningError
from mail_pipelines.provisioning.states import State, Step
from mail_pipelines.provisioning.verifying import Speaks
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.provisioning import Provisioning
from mail_pipelines.sensors.capacity import capacity_sensor
from tests.parts.knot import KEY, Knot
from tests.parts.knot import running as knot_running
from tests.provisioning import hoster
from tests.provisioning.world import ANSIBLE_CFG, PLAYBOOK, REMOVAL, Hoster

ON_MARIADB = pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)
HOSTS = """
[[source]]
name = "north"
kind = "command"
command = {command}
key_file = "{key_file}"
curve = "careful"

[variables]
place = "{place}"
"""


@pytest.fixture
def knot(tmp_path: Path) -> Iterator[Knot]:
    folder = tmp_path / "knot"
    folder.mkdir()
    with knot_running(folder, ("mail.test", "0.0.127.in-addr.arpa")) as knot:
        yield knot


@pytest.fixture
def settings(
    engine: sa.Engine, database_url: str, knot: Knot, hosters: tuple[Hoster, Hoster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[config.Settings]:
    """An installation with a source of hosts and a small playbook. The DNS is published by hand."""
    north, _ = hosters
    place, project = tmp_path / "place", tmp_path / "checkout" / "infra" / "ansible"
    place.mkdir()
    project.mkdir(parents=True)
    (project / "server.yml").write_text(PLAYBOOK)
    (project / "remove.yml").write_text(REMOVAL)
    (project / "ansible.cfg").write_text(ANSIBLE_CFG)
    monkeypatch.setattr(config, "project_folder", lambda: tmp_path / "checkout")
    given = {
        "DATABASE__URL": database_url,
        "SENDING__TOKEN_KEY": "a key for tests",
        "SENDING__ALLOW_UNVERIFIED": "false",
        "DNS__SERVERS": knot.address,
        "DNS__UPDATE_SERVER": knot.address,
        "DNS__UPDATE_KEY": KEY,
        "DNS__SPF_INCLUDE": "_spf.mail.test",
        "PROVISIONING__DOMAIN": "mail.test",
        "PROVISIONING__RETRY_SECONDS": "0",
        # Its only heartbeats are the test's own, which are good for some minutes.
        "SERVER__HEARTBEAT_SECONDS": "200",
    }
    for name, value in given.items():
        monkeypatch.setenv(f"MAIL_PIPELINES_{name}", value)
    commands.settings.cache_clear()
    settings = config.load()
    Path(settings.provisioning.hosts).parent.mkdir(parents=True, exist_ok=True)
    command = json.dumps([sys.executable, hoster.__file__, str(north.folder)])
    Path(settings.provisioning.hosts).write_text(HOSTS.format(command=command, key_file=north.key_file, place=place))
    yield settings
    commands.settings.cache_clear()


def command(*words: str) -> str:
    result = CliRunner().invoke(app, ["server", *words])
    assert result.exit_code == 0, result.output
    return result.output


def lack(engine: sa.Engine, servers: int) -> None:
    """A plan is in force by which so many are to be ordered today."""

    def work(connection: sa.Connection) -> None:
        now = database_now(connection)
        why = "google: 900,000 messages come up"
        day = now.date()
        order = FarOrder("default", servers, day, day + dt.timedelta(days=2), day - dt.timedelta(days=1), due=True, short=500_000, left=0, why=why)
        document = {"far": [far.to_document(order)], "orders": []}
        connection.execute(sa.insert(SyncState).values(source="capacity", key="plan", value=document, version=1, changed_at=now))

    transact(engine, work)


@pytest.fixture
def tick(settings: config.Settings, instance: dg.DagsterInstance) -> Callable[[], list[dg.RunRequest]]:
    repository = build_defs().get_repository_def()

    def look() -> list[dg.RunRequest]:
        with dg.build_sensor_context(instance=instance, repository_def=repository) as context:
            found = capacity_sensor(Provisioning())(context, CentralDatabase())
        assert isinstance(found, dg.SensorResult)
        for request in found.run_requests or []:
            job = build_defs().resolve_job_def(request.job_name or "")
            resources = {"database": CentralDatabase(), "provisioning": Provisioning()}
            job.execute_in_process(run_config=request.run_config, tags=request.tags, instance=instance, resources=resources)
        return list(found.run_requests or [])

    return look


def provision(engine: sa.Engine) -> store.Provision:
    with reading(engine) as connection:
        return store.find(connection, "mx1")


@ON_MARIADB
@pytest.mark.server
def test_what_the_plan_lacks_is_proposed_made_named_verified_and_warmed(
    engine: sa.Engine, settings: config.Settings, tick: Callable[[], list[dg.RunRequest]], knot: Knot, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Exim says has tests of its own.
    monkeypatch.setattr(verifying, "Sends", Speaks)
    lack(engine, 1)
    assert tick() == []
    assert "open" in command("proposals")
    command("provision", "--proposal", "1")
    assert len(tick()) == 1
    # It waits for somebody to publish its names, and everybody who may look is told so.
    waits = provision(engine)
    assert (waits.state, waits.step) == (State.WAITING_DNS, Step.PUBLISH)
    assert [line.split()[0] for line in waits.records or []] == ["mx1.mail.test.", "1.0.0.127.in-addr.arpa.", "_spf.mail.test."]
    assert "mx1 is being made: waiting_dns, publish: 3 DNS records" in command("list")
    assert "waiting_dns" in command("show", "mx1")

    # By a program from now on; and its process has begun to speak.
    monkeypatch.setenv("MAIL_PIPELINES_DNS__PUBLISHER", "rfc2136")

    def speak(connection: sa.Connection) -> None:
        connection.execute(sa.update(Server).values(heartbeat_at=database_now(connection)))
        connection.execute(sa.update(Provision).values(due_at=database_now(connection)))

    transact(engine, speak)
    assert len(tick()) == 1
    assert (knot.has("mx1.mail.test.", "A"), knot.has("1.0.0.127.in-addr.arpa.", "PTR")) == (["127.0.0.1"], ["mx1.mail.test."])
    assert provision(engine).state is State.WARMING
    with reading(engine) as connection:
        now = database_now(connection)
        assert connection.execute(sa.select(Server.state)).scalar_one() == "warming"
        assert [(row.provider, row.curve, row.step) for row in warm_up.standings(connection, now)] == [("*", "careful", 0)]
    # The plan is the same, and what it lacked is there.
    assert tick() == []
    assert command("proposals").count("accepted") == 1

    command("remove", "mx1", "--now")
    assert len(tick()) == 1
    assert provision(engine).state is State.RETIRED
    assert knot.has("mx1.mail.test.", "A") == knot.has("1.0.0.127.in-addr.arpa.", "PTR") == []
    assert list((settings.home / "secrets" / "servers").iterdir()) == []


# --- on the host ------------------------------------------------------------------------------------------------


@pytest.fixture
def host(hosters: tuple[Hoster, Hoster]) -> Host:
    north, _ = hosters
    return north.source().create(Order("mx1", "", ssh_keys.generate()))


def test_a_host_is_asked_over_ssh_and_another_one_in_its_place_is_not(host: Host) -> None:
    assert over_ssh.run(host, ["echo", "two words"], seconds=120).stdout == "two words\n"
    other = Host(host.id, host.address, "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGEF7tFvvG0IWEUcHtOL8hPNMwlKzyBLCzi0Bgn7YHjq", host.user, host.key_file, host.port)
    with pytest.raises(ProvisioningError, match="does not let us in"):
        over_ssh.run(other, ["true"], seconds=120)
    with pytest.raises(ProvisioningError, match="was not done within 1 s"):
        over_ssh.run(host, ["tail", "-f", "/dev/null"], seconds=1)


def test_what_a_host_finds_is_found_here_and_what_is_no_finding_is_told(host: Host, hosters: tuple[Hoster, Hoster]) -> None:
    program = hosters[0].folder / "hosts" / "mx1" / "bin" / "mail-pipelines"
    program.parent.mkdir()
    program.write_text("""#!/bin/sh
        [ "$*" = "server verify mx1 --json" ] && echo '[{"name": "port 25", "ok": false, "text": "nobody answers"}]'
        exit 1
    """)
    program.chmod(0o755)
    assert verifying.on_host(host, "mx1") == [Finding("port 25", False, "nobody answers")]
    program.write_text("#!/bin/sh\necho the schema is older than this version >&2; exit 1\n")
    with pytest.raises(ProvisioningError, match=r"status 1\): the schema is older than this version"):
        verifying.on_host(host, "mx1")
