"""The documentation tells the truth: its commands run, its examples are accepted, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
import yaml
from typer.core import TyperGroup
from typer.main import get_command

from mail_pipelines import config_text
from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.campaigns import yaml_form
from mail_pipelines.cli import app
from mail_pipelines.messages.compilation import compile_content
from mail_pipelines.segments import criteria
from mail_pipelines.segments.catalogue import Catalogue, CustomField, KnownList
from mail_pipelines.sources import declaration
from tests.parts.processes import stop

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# Typed and looked for by `tests/runbook`, which reads that page alone.
OF_THE_RUNBOOK = {"sh runbook", "text printed"}
# The words after the three back quotes. `until-ctrl-c` commands run until they say so, and then get a SIGINT.
KINDS = {"bash", "bash until-ctrl-c", "text", "toml", "yaml campaign", "yaml dagster", "yaml segment", "yaml source", *OF_THE_RUNBOOK}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def _blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        yield Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])


BLOCKS = [block for page in PAGES for block in _blocks(page)]


def _of_kind(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind == kind]


def test_every_block_says_what_it_is() -> None:
    assert [str(block) for block in BLOCKS if block.kind not in KINDS] == []
    runbook = ROOT / "docs/runbook.md"
    assert [str(block) for block in BLOCKS if (block.kind in OF_THE_RUNBOOK) != (block.page == runbook)] == []


COMMANDS = [
    (block, line)
    for block in _of_kind("text")
    for line in block.text.splitlines()
    if line.startswith("mail-pipelines ") and not line.startswith("mail-pipelines --")
]


@pytest.mark.parametrize(("block", "line"), COMMANDS, ids=str)
def test_a_command_that_is_only_to_be_read_exists_and_takes_what_it_is_given(block: Block, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """These need a server, a DNS or an hour, so they are not run here; `click` reads their words as it would before running them."""
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    words = shlex.split(line, comments=True)[1:]
    command = get_command(app)
    while isinstance(command, TyperGroup):
        name = words.pop(0)
        assert name in command.commands, f"{block}: there is no command {name} in {line!r}"
        command = command.commands[name]
    command.make_context(command.name, words).close()


def test_a_command_with_a_wrong_option_would_be_found() -> None:
    assert len(COMMANDS) > 10
    commands = get_command(app)
    assert isinstance(commands, TyperGroup)
    servers = commands.commands["server"]
    assert isinstance(servers, TyperGroup)
    with pytest.raises(Exception, match="No such option"):
        servers.commands["limits"].make_context("limits", ["google", "--fashion", "burst"])


# --- commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the checkout, so that what a command writes beside itself does not land in the real one."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in (".git", ".mail_pipelines"):
            (folder / entry.name).symlink_to(entry)
    return folder


# What is run as a whole by another test, or runs the tests.
ELSEWHERE = {
    "script/demo\n": (ROOT / "tests/demo/test_demo.py", '[checkout() / "script" / "demo", "--json"]'),
    "script/test\n": (ROOT / ".ci/run", "/script/test"),
}


@pytest.mark.parametrize("command", ELSEWHERE)
def test_what_is_run_elsewhere_is_run_there(command: str) -> None:
    file, words = ELSEWHERE[command]
    assert words in file.read_text(encoding="utf-8")
    assert os.access(ROOT / command.strip(), os.X_OK)


# One whole installation at a time: two cores are too few for all of them.
@pytest.mark.xdist_group("centre")
@pytest.mark.server
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.kind.startswith("bash")}), ids=lambda page: page.name)
def test_the_commands_of_the_page_work_in_their_order(page: Path, checkout: Path, tmp_path: Path) -> None:
    # The reader's environment: without what makes other tests easier.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_") and name != "MAIL_PIPELINES_SENDING__ALLOW_UNVERIFIED"}
    environ |= {
        "MAIL_PIPELINES_OPERATION__UI_PORT": "0",
        # Nothing answers there: no test asks the real DNS.
        "MAIL_PIPELINES_DNS__SERVERS": "127.0.0.1:9",
        # `script/test` is run up to its last step, which then only lists the tests: this one is among them.
        "PYTEST_ADDOPTS": "--collect-only",
        "STATE": str(tmp_path / "variables"),
    }
    (tmp_path / "variables").touch()
    for block in _blocks(page):
        if block.text in ELSEWHERE:
            continue
        if block.kind == "bash":
            script = f'. "$STATE"\n{block.text}\nexport -p >"$STATE"\n'
            result = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=checkout, env=environ, capture_output=True, text=True)
            assert result.returncode == 0, f"{block}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
        elif block.kind == "bash until-ctrl-c":
            _run_until_ctrl_c(block, checkout, environ)


def _run_until_ctrl_c(block: Block, folder: Path, environ: dict[str, str]) -> None:
    """`exec`, so that the signal reaches the program as a terminal's Ctrl-C would. The demo in its full size is `tests/demo/test_demo.py`."""
    command = block.text.replace("script/demo\n", "script/demo --contacts 3000\n")
    script = f'. "$STATE"\nexec {command}'
    with subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if "Ctrl-C" in line:
                    break
            else:
                pytest.fail(f"{block} ended by itself:\n{said[-3000:]}")
            process.send_signal(signal.SIGINT)
            assert process.wait(180) == 0, f"{block}\n{said[-3000:]}{process.stdout.read()[-3000:]}"
        finally:
            stop(process, 120)


# --- examples ---------------------------------------------------------------------------------------------------

CATALOGUE = Catalogue(
    fields=(
        CustomField(1, "city", "text"),
        CustomField(2, "age", "number"),
        CustomField(3, "signed_up", "date"),
        CustomField(4, "premium", "boolean"),
    ),
    lists=(KnownList(1, "news"),),
    campaigns=(),
)


@pytest.mark.parametrize("block", _of_kind("yaml segment"), ids=str)
def test_a_segment_in_the_documentation_is_accepted(block: Block) -> None:
    assert criteria.parse(yaml.safe_load(block.text), CATALOGUE)


@pytest.mark.parametrize("block", _of_kind("yaml source"), ids=str)
def test_a_source_in_the_documentation_is_accepted(block: Block) -> None:
    assert declaration.parse(block.text, str(block)).sections


@pytest.mark.parametrize("block", _of_kind("yaml campaign"), ids=str)
def test_a_campaign_in_the_documentation_is_accepted(block: Block) -> None:
    document = yaml_form.parse(block.text)
    assert document.content is not None
    assert yaml_form.parse(yaml_form.render(document)) == document
    assert compile_content(document.content, {"first_name": "text"}, lambda urls: range(1, len(urls) + 1))


@pytest.mark.parametrize("block", _of_kind("toml"), ids=str)
def test_settings_in_the_documentation_are_accepted(block: Block, tmp_path: Path) -> None:
    from mail_pipelines import config

    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/database_password").write_text("x")
    (tmp_path / "config.toml").write_text(block.text)
    config.load({"MAIL_PIPELINES_HOME": str(tmp_path)})


@pytest.mark.server
@pytest.mark.parametrize("block", _of_kind("yaml dagster"), ids=str)
def test_dagster_keeps_its_records_where_the_documentation_says(block: Block, mariadb: MariaDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Added to the file that `init` writes. What one process has stored, another one reads."""
    given = (ROOT / "infra/dagster/embedded/dagster.yaml").read_text()
    (tmp_path / "dagster.yaml").write_text(f"{given}\n{block.text}")
    with mariadb.connect() as connection, connection.cursor() as cursor:
        cursor.execute("CREATE DATABASE dagster CHARACTER SET utf8mb4")
        cursor.execute("CREATE USER 'dagster'@'%' IDENTIFIED BY 'a:b/c@d'")
        cursor.execute("GRANT ALL ON dagster.* TO 'dagster'@'%'")
    place = {"HOST": "127.0.0.1", "PORT": str(mariadb.port), "DB": "dagster", "USER": "dagster", "PASSWORD": "a:b/c@d"}
    for name, value in place.items():
        monkeypatch.setenv(f"DAGSTER_MYSQL_{name}", value)
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        instance.add_dynamic_partitions("campaigns", ["spring"])
        instance.report_runless_asset_event(dg.AssetMaterialization("send_batches", partition="spring|00"))
    with mariadb.connect("dagster") as connection, connection.cursor() as cursor:
        cursor.execute("SELECT COUNT(*) FROM event_logs")
        assert cursor.fetchone() == (1,)
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert instance.get_dynamic_partitions("campaigns") == ["spring"]
        assert instance.get_materialized_partitions(dg.AssetKey("send_batches")) == {"spring|00"}


def test_the_page_of_settings_is_current() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == config_text.reference(), "run: mail-pipelines config reference >docs/configuration.md"


# --- links ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []
