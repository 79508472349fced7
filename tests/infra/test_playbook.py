"""What can be told of the playbooks without hosts: that Ansible and its critic take them, and that the program takes what they write."""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2
import pytest
import yaml

from mail_pipelines import config
from mail_pipelines.resources.broker_accounts import rights
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


def test_ansible_reads_them_and_finds_every_role(tmp_path: Path) -> None:
    said = ansible(tmp_path, "--list-tasks", FOLDER / "site.yml")
    roles = {role.name for role in (FOLDER / "roles").iterdir()}
    assert roles == {line.split(" : ")[0].strip() for line in said.splitlines() if " : " in line}
    assert all((FOLDER / f"roles/{role}/meta/argument_specs.yml").is_file() for role in roles)


@pytest.mark.slow
def test_nothing_but_builtin_modules_and_nothing_that_ansible_lint_would_not_have_in_production(tmp_path: Path) -> None:
    words = ["--offline", "--nocolor", "--profile", "production", "--enable-list", "only-builtins"]
    environ = os.environ | {"ANSIBLE_HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([Path(sys.executable).parent / "ansible-lint", *words], cwd=FOLDER, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_program_takes_the_environment_that_it_writes(tmp_path: Path) -> None:
    """With passwords as the hosts' own would be read by the playbook."""

    passwords = {"stdout_lines": [f"of {name}" for name in ("mail", "dagster", "results")]}
    written = tmp_path / "environment"
    template = {"src": str(FOLDER / "roles/platform/templates/environment.j2"), "dest": str(written)}
    of_broker = {"stdout_lines": [f"of {name}" for name in ("broker", "broker.accounts")]}
    everywhere = {"hosts": "all", "gather_facts": False, "connection": "local"}
    play = [
        everywhere | {"tasks": [{"ansible.builtin.set_fact": {"database_passwords": passwords, "broker_passwords": of_broker}}]},
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
    assert settings.broker.url == "amqp://centre:of broker@127.0.0.1:5672/mail"
    assert settings.broker.management_url == "http://centre-accounts:of broker.accounts@127.0.0.1:15672"
    assert (settings.sending.public_url, settings.sending.bounce_host) == ("https://mail.example.com", "mx.example.com")
    assert environ["DAGSTER_MYSQL_URL"] == "mysql+pymysql://dagster:of dagster@db.example.com/dagster?ssl_ca=/etc/mail-pipelines/tls/ca.pem"


def test_a_file_is_written_where_content_or_mode_differ_and_a_check_only_says_so(tmp_path: Path) -> None:
    new, other, same = tmp_path / "folder/new", tmp_path / "other", tmp_path / "same"
    owner, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(os.getgid()).gr_name
    wanted = json.dumps([{"path": str(path), "content": "now\n", "mode": "0400", "owner": owner, "group": group} for path in (new, other, same)])
    for path, mode in ((other, 0o644), (same, 0o400)):
        path.write_text("now\n")
        path.chmod(mode)

    def put(*options: str) -> list[str]:
        return subprocess.run([sys.executable, FOLDER / "put.py", *options], input=wanted, capture_output=True, text=True, check=True).stdout.split()

    assert put("--check") == put("--check") == [str(new), str(other)]
    before = same.stat()
    assert put() == [str(new), str(other)]
    assert put() == put("--check") == []
    assert same.stat() == before
    assert {(path.read_text(), oct(path.stat().st_mode)) for path in (new, other, same)} == {("now\n", "0o100400")}
    # One that its program does not take.
    wanted = json.dumps([{"path": str(same), "content": "bad\n", "mode": "0400", "owner": owner, "group": group, "validate": ["grep", "now"]}])
    with pytest.raises(subprocess.CalledProcessError):
        put()
    assert same.stat() == before
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "new", "other", "same"]


def test_it_gives_a_server_the_rights_at_the_broker_that_the_program_gives() -> None:
    """Only the playbook knows which servers share a host, and the program makes the account of one server."""
    template = jinja2.Environment(trim_blocks=True).from_string((FOLDER / "roles/accounts/templates/broker.j2").read_text(encoding="utf-8"))

    def right(*names: str) -> str:
        given = {"accounts_hosts": [names[0]], "groups": {"servers": ["host"]}, "hostvars": {"host": {"servers": [{"name": name} for name in names]}}}
        script = template.render(given)
        (permission,) = json.loads(script[script.index("<<JSON") + 6 : script.rindex("JSON")])["permissions"]
        assert (permission["user"], permission["configure"], permission["write"]) == (names[0], permission["read"], permission["read"])
        return str(permission["read"])

    def of(expression: str, names: Sequence[str]) -> set[str]:
        return {name for name in names if re.search(expression, name)}

    own = [f"{name}{rest}" for name in ("mx.1", "mx-1", "mx.12", "mx2", "dispatch", "centre") for rest in ("", "-ctl", ".pidbox", "@mx.1", "-ctl@a.b", "-x")]
    assert of(right("mx.1"), own) == of(rights("mx.1"), own) == {"dispatch", "mx.1", "mx.1-ctl", "mx.1.pidbox", "mx.1@mx.1", "mx.1-ctl@a.b"}
    assert of(right("mx.1", "mx2"), own) == of(rights("mx.1"), own) | {"mx2", "mx2-ctl"}


def test_the_program_takes_what_it_writes_for_a_host_with_two_servers(tmp_path: Path) -> None:
    """Each has its own account and key; what is the host's has the first one's."""
    home, lines = tmp_path / "home", ["url://one", "word one", "key one", "url://two", "word two", "key two"]
    lines += ["of the broker", "DAGSTER_MYSQL_URL='dagster://mx1'", "MAIL_PIPELINES_BROKER__RESULTS='db+results://mx1'", "certificate"]
    servers = [{"name": "mx1", "address": "192.0.2.1", "hostname": "mx1.example.com"}, {"name": "mx2", "address": "192.0.2.2"}]
    given = {"servers": servers, "worker_read": {"stdout_lines": lines}, "metrics_address": "10.0.0.11", "worker_verify_key": "ab" * 32, "worker_settings": {}}
    roles = FOLDER / "roles/worker/templates"
    (home / "servers").mkdir(parents=True)
    template = {"src": str(roles / "server.toml.j2"), "dest": f"{home}/servers/{{{{ item.name }}}}.toml"}
    tasks: list[dict[str, object]] = [
        {"ansible.builtin.template": {"src": str(roles / "server.environment.j2"), "dest": str(tmp_path / "environment")}},
        {"ansible.builtin.template": template, "loop": "{{ servers }}", "loop_control": {"index_var": "worker_index"}},
    ]
    play = {"hosts": "centre", "gather_facts": False, "connection": "local", "tasks": tasks, "vars": {"ansible_python_interpreter": sys.executable}}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    shared = yaml.safe_load((FOLDER / "group_vars/all.yml").read_text())
    ansible(tmp_path, "--extra-vars", json.dumps(shared | given | {"playbook_dir": str(FOLDER)}), tmp_path / "play.yml")
    environ = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if line)
    environ = {name: value.strip("'") for name, value in environ.items()} | {"MAIL_PIPELINES_HOME": str(home)}
    first, second = config.members(environ | {"MAIL_PIPELINES_SENDING__TOKEN_KEY": "key one"}).values()
    assert [(one.database.url, one.database.password) for one in (first, second)] == [("url://one", "word one"), ("url://two", "word two")]
    assert (first.sending.token_key, second.sending.token_key) == ("key one", "key two")
    assert [one.server.address for one in (first, second)] == ["192.0.2.1", "192.0.2.2"]
    assert (second.server.exim, first.server.hostname, second.metrics.port) == ("mx1", "mx1.example.com", 9467)
    assert first.broker.url == second.broker.url == "amqps://mx1:of the broker@centre.example.com:5671/mail"
    assert (first.broker.results, environ["DAGSTER_MYSQL_URL"]) == ("db+results://mx1", "dagster://mx1")
