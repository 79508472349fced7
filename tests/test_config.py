"""Settings: where a value comes from, what is refused, what stays hidden."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mail_pipelines import config, config_text
from mail_pipelines.config import ConfigError


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def _environ(home: Path, **variables: str) -> dict[str, str]:
    return {"MAIL_PIPELINES_HOME": str(home), **variables}


def _write(home: Path, text: str) -> None:
    (home / "config.toml").write_text(text, encoding="utf-8")


def _origin(home: Path, key: str, **variables: str) -> tuple[object, str]:
    row = next(row for row in config.describe(_environ(home, **variables)) if row.key == key)
    return row.value, row.origin


def test_the_environment_beats_the_file_which_beats_the_default_and_each_is_named(home: Path) -> None:
    assert _origin(home, "server.slots") == (2, "default")
    _write(home, "[server]\nslots = 3\n")
    assert _origin(home, "server.slots") == (3, str(home / "config.toml"))
    assert _origin(home, "server.slots", MAIL_PIPELINES_SERVER__SLOTS="4") == (4, "MAIL_PIPELINES_SERVER__SLOTS")
    assert config.load(_environ(home)).server.slots == 3


def test_home_in_a_value_is_the_home_folder(home: Path) -> None:
    settings = config.load(_environ(home, MAIL_PIPELINES_SNAPSHOTS__FOLDER="{home}/elsewhere"))
    assert settings.snapshot_folder == home / "elsewhere"
    assert settings.database.url == f"sqlite:///{home}/central.sqlite3"


def test_without_a_variable_the_home_lies_beside_the_workspace_file() -> None:
    root = Path(__file__).resolve().parent.parent
    assert (root / "workspace.yaml").is_file()
    assert config.home_folder({}) == root / ".mail_pipelines"


def test_a_list_is_given_by_commas(home: Path) -> None:
    assert config.load(_environ(home, MAIL_PIPELINES_SERVER__CATCHERS="a, b")).server.catchers == ["a", "b"]


def test_secrets_come_from_files_and_are_never_shown(home: Path) -> None:
    (home / "key").write_text("s3cret\n")
    by_variable = _environ(home, MAIL_PIPELINES_SENDING__TOKEN_KEY_FILE=str(home / "key"))
    assert config.load(by_variable).token_key() == b"s3cret"
    _write(home, '[sending]\ntoken_key_file = "{home}/key"\n[database]\nurl = "mysql+pymysql://user:hunter2@db/mail"\n')
    assert config.load(_environ(home)).token_key() == b"s3cret"
    shown = {row.key: row.value for row in config.describe(_environ(home))}
    assert shown["sending.token_key"] == "********"
    assert shown["database.url"] == "mysql+pymysql://user:***@db/mail"
    assert "s3cret" not in str(shown)
    assert "hunter2" not in str(shown)


def test_a_secret_given_twice_is_refused(home: Path) -> None:
    (home / "key").write_text("x")
    with pytest.raises(ConfigError, match="TOKEN_KEY and MAIL_PIPELINES_SENDING__TOKEN_KEY_FILE are both set; keep one"):
        config.load(_environ(home, MAIL_PIPELINES_SENDING__TOKEN_KEY="a", MAIL_PIPELINES_SENDING__TOKEN_KEY_FILE=str(home / "key")))
    _write(home, '[sending]\ntoken_key = "a"\ntoken_key_file = "{home}/key"\n')
    with pytest.raises(ConfigError, match=r"sending\.token_key and sending\.token_key_file are both given; keep one"):
        config.load(_environ(home))


def test_a_secret_file_that_cannot_be_read_is_named(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"TOKEN_KEY_FILE names /nowhere/key, which cannot be read: No such file"):
        config.load(_environ(home, MAIL_PIPELINES_SENDING__TOKEN_KEY_FILE="/nowhere/key"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nslot = 3\n", r"config\.toml: unknown key server\.slot; did you mean 'slots'\?"),
        ("[servers]\nslots = 3\n", r"unknown section \[servers\]; did you mean 'server'\?"),
        ("slots = 3\n", r"unknown section \[slots\]"),
        ("[server]\nslots = 'many'\n", r"server\.slots \(from .*config\.toml\): .*integer.*, not 'many'"),
        ("[server]\nslots = 0\n", r"server\.slots .* greater than or equal to 1, not 0"),
        ("[server\n", r"config\.toml is not valid TOML: .*line 1"),
        ("[server]\nslots_file = '/x'\n", r"unknown key server\.slots_file"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_the_nearest_key(home: Path, text: str, message: str) -> None:
    _write(home, text)
    with pytest.raises(ConfigError, match=message):
        config.load(_environ(home))


def test_an_unknown_variable_is_named_with_the_nearest(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"MAIL_PIPELINES_SERVER__SLOT; did you mean 'MAIL_PIPELINES_SERVER__SLOTS'\?"):
        config.load(_environ(home, MAIL_PIPELINES_SERVER__SLOT="3"))
    assert config.load(_environ(home, MAIL_PIPELINES_SERVER="s1", UNRELATED="x")).server.slots == 2


def test_each_server_of_a_host_has_settings_of_its_own(home: Path) -> None:
    (home / "servers").mkdir()
    (home / "secret").write_text("hunter2\n")
    (home / "servers/s2.toml").write_text('[server]\nexim = "s1"\nslots = 5\n[database]\npassword_file = "{home}/secret"\n', encoding="utf-8")
    environ = _environ(home, MAIL_PIPELINES_SERVER="s1, s2", MAIL_PIPELINES_SERVER__SLOTS="3")
    assert config.servers_of_this_host(environ) == ("s1", "s2")
    assert config.servers_of_this_host(_environ(home)) == ()
    first, second = config.load(environ), config.load_for("s2", environ)
    assert (first.this_server, first.server.slots, first.server.exim, first.database.password) == ("s1", 3, "", None)
    assert (second.this_server, second.server.slots, second.server.exim, second.database.password) == ("s2", 5, "s1", "hunter2")
    assert _origin(home, "server.slots", MAIL_PIPELINES_SERVER="s2") == (5, str(home / "servers/s2.toml"))
    (home / "servers/s2.toml").write_text("[server]\nslot = 5\n", encoding="utf-8")
    assert config.load(environ) == first
    with pytest.raises(ConfigError, match=r"servers/s2\.toml: unknown key server\.slot; did you mean 'slots'"):
        config.load_for("s2", environ)


def test_a_wrong_value_of_a_secret_or_url_is_not_repeated(home: Path) -> None:
    _write(home, "[sending]\ntoken_key = 424242\n")
    with pytest.raises(ConfigError, match=r"sending\.token_key") as caught:
        config.load(_environ(home))
    assert "424242" not in str(caught.value)


def test_a_new_homes_file_changes_no_default(home: Path) -> None:
    without = config.load(_environ(home))
    _write(home, config_text.template({}))
    assert config.load(_environ(home)) == without


def test_the_template_names_every_key_and_its_lines_are_valid(home: Path) -> None:
    lines = config_text.template({}).splitlines()
    uncommented = tomllib.loads("\n".join(line.removeprefix("# ") if " = " in line and not line.endswith(")") else line for line in lines))
    for section, model in config.SECTIONS.items():
        names = {f"{name}_file" if config.is_secret(section, name) else name for name in model.model_fields}
        assert set(uncommented[section]) == names


def test_config_show_prints_every_key_with_its_origin(home: Path) -> None:
    _write(home, "[server]\nslots = 3\n")
    command = [sys.executable, "-m", "mail_pipelines", "config", "show"]
    text = subprocess.run(command, env=_environ(home), check=True, capture_output=True, text=True).stdout
    assert any(line.split() == ["server.slots", "3", str(home / "config.toml")] for line in text.splitlines())
    rows = json.loads(subprocess.run([*command, "--json"], env=_environ(home), check=True, capture_output=True, text=True).stdout)
    assert {row["key"] for row in rows} == {"home"} | {f"{section}.{name}" for section, model in config.SECTIONS.items() for name in model.model_fields}


def test_a_users_mistake_shows_one_line_and_no_traceback(home: Path) -> None:
    _write(home, "[server]\nslot = 3\n")
    result = subprocess.run([sys.executable, "-m", "mail_pipelines", "config", "show"], env=_environ(home), capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert "did you mean 'slots'?" in result.stderr
