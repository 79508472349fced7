"""What can be told of the playbook without hosts: that Ansible reads it, and that the program takes the environment that it writes.

What it makes of two bare hosts is `script/centre`'s to show.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from mail_pipelines import config
from tests.infra.installing import ROOT

FOLDER = ROOT / "infra/ansible"
INVENTORY = FOLDER / "hosts.example.yml"


def ansible(home: Path, *words: object) -> str:
    """`ansible-playbook` over the example's hosts, without a login to any of them."""
    environ = os.environ | {"ANSIBLE_CONFIG": str(FOLDER / "ansible.cfg"), "ANSIBLE_HOME": str(home), "ANSIBLE_LOCAL_TEMP": str(home)}
    command = [str(word) for word in (Path(sys.executable).parent / "ansible-playbook", "-i", INVENTORY, *words)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ansible_reads_it_and_finds_every_role(tmp_path: Path) -> None:
    said = ansible(tmp_path, "--list-tasks", FOLDER / "centre.yml")
    assert {role.name for role in (FOLDER / "roles").iterdir()} <= {line.split(" : ")[0].strip() for line in said.splitlines() if " : " in line}


def test_the_program_takes_the_environment_that_it_writes(tmp_path: Path) -> None:
    """With passwords as the hosts' own would be read by the playbook."""

    def read(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    passwords = {"results": [{"item": name, "content": read(f"of {name}\n")} for name in ("mail", "dagster", "results")]}
    written = tmp_path / "environment"
    template = {"src": str(FOLDER / "roles/platform/templates/environment.j2"), "dest": str(written)}
    everywhere = {"hosts": "all", "gather_facts": False, "connection": "local"}
    play = [
        everywhere | {"tasks": [{"ansible.builtin.set_fact": {"database_passwords": passwords, "broker_password": {"content": read("of the broker\n")}}}]},
        everywhere | {"hosts": "centre", "tasks": [{"ansible.builtin.template": template, "vars": {"ansible_python_interpreter": sys.executable}}]},
    ]
    (tmp_path / "play.yml").write_text(yaml.safe_dump(play))
    shared = yaml.safe_load((FOLDER / "group_vars/all.yml").read_text())
    ansible(tmp_path, "--extra-vars", json.dumps(shared | {"playbook_dir": str(FOLDER)}), tmp_path / "play.yml")
    environ = dict(line.split("=", 1) for line in written.read_text().splitlines() if line)
    assert all(value[0] == value[-1] == "'" for value in environ.values())
    environ = {name: value.strip("'") for name, value in environ.items()}
    settings = config.load(environ | {"MAIL_PIPELINES_HOME": str(tmp_path / "home"), "MAIL_PIPELINES_SENDING__TOKEN_KEY": "k"})
    assert settings.database.url == "mysql+pymysql://mail:of mail@db.example.com/mail?ssl_ca=/etc/mail-pipelines/tls/ca.pem"
    assert settings.broker.url == "amqp://centre:of the broker@127.0.0.1:5672/mail"
    assert (settings.sending.public_url, settings.sending.bounce_host) == ("https://mail.example.com", "mx.example.com")
    assert "@db.example.com/dagster?" in environ["DAGSTER_MYSQL_URL"]
