"""Sources of hosts: the file that names them, the contract with a command, clouds by their tools, catchers of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mail_pipelines import config
from mail_pipelines.database.engine import transact
from mail_pipelines.dispatch.files import ServerFolders, is_locked
from mail_pipelines.provisioning import ssh_keys, store
from mail_pipelines.provisioning.interfaces import NoHost, Order, ProvisioningError
from mail_pipelines.provisioning.secret_values import MASK, Secrets
from mail_pipelines.provisioning.sources import reading
from mail_pipelines.provisioning.sources.catchers import Catchers, Starter
from mail_pipelines.provisioning.sources.command import Command
from mail_pipelines.provisioning.sources.inventory import Inventory
from mail_pipelines.provisioning.states import State
from mail_pipelines.provisioning.verifying import Speaks
from tests.parts.processes import wait_for
from tests.provisioning.world import World

ROOT = Path(__file__).resolve().parents[2]
SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


# --- the file ---------------------------------------------------------------------------------------------------


def read(tmp_path: Path, text: str) -> reading.Hosts:
    (tmp_path / "hosts.toml").write_text(text)
    return reading.read(config.load({"MAIL_PIPELINES_HOME": str(tmp_path)}))


def test_the_example_of_the_documentation_is_a_file_of_sources(tmp_path: Path) -> None:
    page = (ROOT / "docs/provisioning.md").read_text()
    (example,) = [block for block in page.split("```") if block.startswith("text\n[[source]]")]
    found = read(tmp_path, example.removeprefix("text\n"))
    rack, hetzner = found.sources
    assert isinstance(rack, Inventory)
    assert isinstance(hetzner, Command)
    assert [(host.address, host.user, host.key_file) for host in rack.hosts] == [
        ("192.0.2.10", "root", f"{tmp_path}/secrets/ssh"),
        ("192.0.2.11", "debian", f"{tmp_path}/secrets/ssh"),
    ]
    assert (hetzner.name, hetzner.cost_per_hour, hetzner.most) == ("hetzner", 0.008, 10)
    assert set(found.variables) == {"broker_host", "centre_addresses"}


@pytest.mark.parametrize(
    ("given", "warm", "curve"),
    [("", False, "normal"), ('curve = "careful"', False, "careful"), ("warm = true", True, ""), ('warm = true\ncurve = "normal"', True, "normal")],
)
def test_servers_of_warm_addresses_are_warmed_up_only_by_a_curve_that_is_named(tmp_path: Path, given: str, warm: bool, curve: str) -> None:
    (source,) = read(tmp_path, f'[[source]]\nname = "rack"\nkind = "inventory"\nhosts = []\n{given}\n').sources
    assert (source.warm, source.curve) == (warm, curve)


def test_without_a_file_there_is_no_source(tmp_path: Path) -> None:
    assert reading.read(config.load({"MAIL_PIPELINES_HOME": str(tmp_path)})).sources == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[source", "is not valid TOML"),
        ('[[source]]\nname = "a"\nkind = "cloud"\n', "inventory"),
        ('[[source]]\nname = "a"\nkind = "command"\ncommand = []\nkey_file = "k"\n', "command"),
        ('[[source]]\nname = "a"\nkind = "command"\ncommand = "rm -rf /"\nkey_file = "k"\n', "list"),
        ('[[source]]\nname = "a"\nkind = "catcher"\nprice = 1\n', "price"),
        ('[[source]]\nname = "a"\nkind = "catcher"\n[[source]]\nname = "a"\nkind = "catcher"\n', "two sources have the same name"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(reading.HostsError, match=words):
        read(tmp_path, text)


# --- a command --------------------------------------------------------------------------------------------------


def command(tmp_path: Path, program: str, **options: float) -> Command:
    (tmp_path / "program.py").write_text(f"import json, sys\nasked = json.load(sys.stdin)\nverb = sys.argv[1]\n{program}\n")
    (tmp_path / "key").write_text(ssh_keys.generate())
    return Command("cloud", [sys.executable, str(tmp_path / "program.py")], "root", str(tmp_path / "key"), **options)


@pytest.mark.parametrize(
    ("program", "kind", "words"),
    [
        ("sys.exit('first line\\nthe API is away')", ProvisioningError, "could not create .status 1.: the API is away"),
        ("print('quota', file=sys.stderr); sys.exit(3)", NoHost, "quota"),
        ("print('not JSON')", ProvisioningError, "no JSON object"),
        ("print('[1]')", ProvisioningError, "no JSON object"),
        ("print('null')", ProvisioningError, "says nothing of it"),
        ("print(json.dumps({'id': 1}))", ProvisioningError, "expected id and address"),
        ("import time; time.sleep(60)", ProvisioningError, "has not ended `create` within 0 s"),
    ],
)
def test_what_a_command_does_wrong_is_told(tmp_path: Path, program: str, kind: type[Exception], words: str) -> None:
    begun = time.monotonic()
    with pytest.raises(kind, match=words):
        command(tmp_path, program, seconds=0.4 if "sleep" in program else 60).create(Order("mx1", "", ssh_keys.generate()))
    assert time.monotonic() - begun < 40


def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ProvisioningError, match="cannot be run: No such file"):
        Command("cloud", [str(tmp_path / "none")], "root", "-").find(Order("mx1"))


def test_a_new_host_gets_the_key_that_we_expect_it_to_have(tmp_path: Path) -> None:
    order = Order("mx1", "", ssh_keys.generate())
    source = command(tmp_path, "open(sys.argv[0] + '.asked', 'w').write(json.dumps(asked)); print(json.dumps({'id': 7, 'address': '192.0.2.1'}))")
    host = source.create(order)
    assert (host.id, host.host_key) == ("7", ssh_keys.public_of(order.ssh_host_key))
    asked = json.loads((tmp_path / "program.py.asked").read_text())
    head, document = asked["cloud_init"].split("\n", 1)
    assert head == "#cloud-config"
    given = json.loads(document)
    assert ssh_keys.public_of(given["ssh_keys"]["ed25519_private"]) == given["ssh_keys"]["ed25519_public"] == host.host_key
    assert given["users"][0]["ssh_authorized_keys"] == [ssh_keys.public_of_file(tmp_path / "key")]


# --- clouds -----------------------------------------------------------------------------------------------------

# A stand-in of a cloud's tool: it keeps hosts in a file, in the form that the tool's documentation gives for its JSON.
TOOL = """
import json, os, pathlib, sys
words, place = sys.argv[1:], pathlib.Path(os.environ["CLOUD"])
hosts = json.loads(place.read_text()) if place.exists() else []
def shown(name):
    return {
        "hcloud": {"id": 42, "name": name, "public_net": {"ipv4": {"ip": "192.0.2.1"}}},
        "aws": {"InstanceId": "i-42", "PublicIpAddress": "192.0.2.1"},
        "doctl": {"id": 42, "name": name, "networks": {"v4": [{"type": "private", "ip_address": "10.0.0.1"}, {"type": "public", "ip_address": "192.0.2.1"}]}},
    }[pathlib.Path(sys.argv[0]).name]
def after(option):
    return words[words.index(option) + 1]
if os.environ.get("FULL"):
    sys.exit("Error: server limit reached")
if "create" in words or "run-instances" in words:
    data = sys.stdin.read()
    assert data.startswith("#cloud-config"), data
    assert "--size=small" in words
    name = after("--name") if "--name" in words else after("--client-token") if "--client-token" in words else after("create")
    place.write_text(json.dumps([*hosts, name]))
    print(json.dumps({"Instances": [shown(name)]}))
elif "list" in words:
    print(json.dumps([shown(name) for name in hosts]))
elif "describe-instances" in words:
    name = after("--filters").partition("Values=")[2]
    print(json.dumps({"Reservations": [{"Instances": [shown(name)]} for known in hosts if known == name]}))
elif "delete" in words or "terminate-instances" in words:
    assert "42" in words or "i-42" in words
    place.write_text("[]")
"""


@pytest.mark.parametrize(("cloud", "tool"), [("hetzner", "hcloud"), ("aws", "aws"), ("digitalocean", "doctl")])
def test_a_cloud_makes_a_host_finds_it_again_and_deletes_it(cloud: str, tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / tool).write_text(f"#!{sys.executable}\n{TOOL}")
    (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CLOUD", str(tmp_path / "cloud.json"))
    (tmp_path / "key").write_text(ssh_keys.generate())
    source = Command(cloud, [str(ROOT / "infra/hosts/cloud"), cloud, "--size=small"], "root", str(tmp_path / "key"))
    order = Order("mx1", "", ssh_keys.generate())
    assert source.find(order) is None
    made = source.create(order)
    assert (made.id, made.address) == ("i-42" if cloud == "aws" else "42", "192.0.2.1")
    assert source.find(order) == made
    assert source.find(Order("mx11", "", order.ssh_host_key)) is None
    source.delete(order, made.id)
    assert source.find(order) is None
    monkeypatch.setenv("FULL", "1")
    with pytest.raises(NoHost, match="server limit reached"):
        source.create(order)


# --- catchers ---------------------------------------------------------------------------------------------------


@SQLITE
@pytest.mark.server
def test_a_catcher_is_made_speaks_serves_and_is_ended(world: World, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", database_url)
    monkeypatch.setenv("MAIL_PIPELINES_SENDING__TOKEN_KEY", "a key for tests")
    run_folder = Path(world.settings.server.run_folder)
    source = Catchers("here", tmp_path / "ports", run_folder)
    world.use(source)
    world.players(catcher=Starter(world.settings))
    world.verify(catcher=Speaks(world.engine, world.settings))
    key = world.request()
    assert world.to_the_end(key).state is State.ACTIVE
    lock = ServerFolders.of(world.settings.server, key).log / "lock"
    assert is_locked(lock)
    # Once more after a kill: the same process.
    pid = (run_folder / "catchers" / key).read_text()
    Starter(world.settings).play(_target(world, key), world.said.append)
    assert (run_folder / "catchers" / key).read_text() == pid
    transact(world.engine, lambda connection: store.give_back(connection, key, "not wanted"))
    wait_for(lambda: world.to_the_end(key).state is State.RETIRED, seconds=60, what="its end")
    assert not is_locked(lock)
    assert not Path(f"/proc/{pid.strip()}").exists() or b"catcher" not in Path(f"/proc/{pid.strip()}/cmdline").read_bytes()
    assert list((tmp_path / "ports").iterdir()) == []


def _target(world: World, key: str):  # type: ignore[no-untyped-def]
    from mail_pipelines.provisioning.steps import target_of

    return target_of(world.parts, world.provision(key))


# --- secrets ----------------------------------------------------------------------------------------------------


def test_a_secret_is_masked_as_it_is_in_lines_and_in_json(tmp_path: Path) -> None:
    key = ssh_keys.generate()
    (tmp_path / "key").write_text(key)
    (tmp_path / "password").write_text('with "quotes" and \\slashes\n')
    secrets = Secrets.of([tmp_path / "key", tmp_path / "password", tmp_path / "none"])
    lines = key.splitlines()[1:-1]
    for text in (key, lines[1], json.dumps({"stdout": key}), json.dumps(lines), 'x with "quotes" and \\slashes y', json.dumps('with "quotes" and \\slashes')):
        masked = secrets.masked(text)
        assert MASK in masked
        assert not any(line in masked for line in lines)
        assert "slashes" not in masked
    # The frame of a key, and what is short, is no secret.
    assert secrets.masked("-----BEGIN OPENSSH PRIVATE KEY-----") == "-----BEGIN OPENSSH PRIVATE KEY-----"


def test_ssh_itself_reads_our_keys(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(ssh_keys.generate())
    (tmp_path / "key").chmod(0o600)
    said = subprocess.run(["ssh-keygen", "-y", "-f", str(tmp_path / "key")], capture_output=True, text=True, check=True).stdout.strip()
    assert said == ssh_keys.public_of_file(tmp_path / "key")
    (tmp_path / "no-key").write_text("x")
    with pytest.raises(ProvisioningError, match="is no private SSH key"):
        ssh_keys.public_of_file(tmp_path / "no-key")
