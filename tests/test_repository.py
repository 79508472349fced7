"""The repository as a whole: one Dagster family, a lock that names no host, every promised package in use, a light send path."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DAGSTER = "1.13.27"
DAGSTER_LIBRARIES = "0.29.27"


def _tracked() -> list[Path]:
    """Every file of the project that Git has or would take."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def _locked() -> dict[str, str]:
    text = (ROOT / "requirements.lock").read_text()
    return dict(re.findall(r"^([a-z0-9.-]+)(?:\[[a-z0-9,-]+\])?==(\S+)", text, re.MULTILINE))


# --- versions ---------------------------------------------------------------------------------------------------


def test_the_dagster_family_agrees() -> None:
    """The siblings pin each other exactly; a newer `dagster` silently brings back libraries of 2021."""
    core = {"dagster", "dagster-graphql", "dagster-pipes", "dagster-shared", "dagster-webserver"}
    found = {name: version for name, version in _locked().items() if name.startswith("dagster")}
    assert {name: found.get(name) for name in core} == dict.fromkeys(core, DAGSTER)
    assert {version for name, version in found.items() if name not in core} <= {DAGSTER_LIBRARIES}
    assert {name: importlib.metadata.version(name) for name in found} == found


def test_the_lock_fits_the_project() -> None:
    result = subprocess.run([sys.executable, ROOT / "script/lock", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_lock_notices_a_changed_dependency(tmp_path: Path) -> None:
    (tmp_path / "script").mkdir()
    for name in ("script/lock", "requirements.lock"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace('"rich>=14"', '"rich>=13"'))
    result = subprocess.run([sys.executable, tmp_path / "script/lock", "--check"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "run script/lock" in result.stderr


def test_every_locked_file_is_hashed_and_no_index_or_host_is_named() -> None:
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"\n(?=\S)", text.partition("\n")[2].strip())
    # Some packages have a version for each Python.
    assert len(entries) >= len(_locked()) > 50
    for entry in entries:
        first, *hashes = entry.replace("\\\n", "\n").splitlines()
        assert re.match(r"^[a-z0-9.\-]+(\[[a-z0-9,\-]+\])?==\S+( ; .+)?$", first.strip()), first
        assert hashes, first
        assert all(re.fullmatch(r"\s+--hash=sha256:[0-9a-f]{64}\s*", line) for line in hashes), first
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text


# --- what is used -----------------------------------------------------------------------------------------------


def _imports(folder: Path) -> set[str]:
    """The top-level modules that the Python files of a folder import, anywhere in them."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("module", ["aiosmtplib", "dagster", "pandas", "pyarrow", "sqlalchemy"])
def test_the_package_imports(module: str) -> None:
    assert module in _imports(ROOT / "mail_pipelines")


def test_the_tests_use_pytest() -> None:
    assert "pytest" in _imports(ROOT / "tests")


def test_up_starts_the_web_server() -> None:
    """As a process of its own (`tests/test_up.py` lets it answer), so no module imports it."""
    from mail_pipelines import dagster_process, up

    for module, names in [(up, "mail_pipelines.dagster_process"), (dagster_process, "dagster_webserver.cli")]:
        assert names in {node.value for node in ast.walk(ast.parse(Path(module.__file__).read_text())) if isinstance(node, ast.Constant)}


@pytest.mark.slow
def test_loading_the_definitions_stays_light() -> None:
    """Every send run and code server loads them; these libraries cost 0.5 to 1 s and 100 MB a process."""
    heavy = ["css_inline", "dlt", "duckdb", "fastapi", "highspy", "inscriptis", "matplotlib", "mjml", "pandas", "pyarrow", "selectolax"]
    program = f"import sys, mail_pipelines.definitions; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_the_command_line_starts_light() -> None:
    heavy = ["alembic", "dagster", "duckdb", "highspy", "matplotlib", "pandas", "pyarrow"]
    program = f"import sys, mail_pipelines.cli; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def test_making_a_home_starting_a_worker_and_asking_whether_a_host_can_send_loads_no_dagster() -> None:
    """It costs each of them a second of the processor, several times in a play of a host."""
    program = "import sys, mail_pipelines.home, mail_pipelines.readiness, mail_pipelines.resources.tasks; sys.exit('dagster' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_playing_destinations_loads_no_database() -> None:
    program = "import sys, mail_pipelines.dispatch.catcher.process; print([name for name in ['cryptography', 'sqlalchemy'] if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


# --- what is written --------------------------------------------------------------------------------------------


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    homes = re.compile(r"/(work|root|home|Users)/[a-z.]")
    found = []
    for path in _tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            # What another test had here for a moment is no file of the project.
            continue
        found += [f"{path.relative_to(ROOT)}:{number}" for number, line in enumerate(text.splitlines(), 1) if homes.search(line)]
    assert found == []


def test_every_package_says_what_belongs_in_it() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for folder in ("mail_pipelines", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if "versions" not in path.parts and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_scripts_are_executable() -> None:
    scripts = [*(ROOT / "script").iterdir(), ROOT / ".ci/run"]
    assert {"setup", "demo", "cluster", "test", "lock", "run"} <= {path.name for path in scripts}
    assert [path.name for path in scripts if not path.stat().st_mode & 0o111] == []


def test_setup_has_nothing_to_do_a_second_time(tmp_path: Path) -> None:
    """From any folder. The environment these tests run in was made by it."""
    for _ in range(2):
        result = subprocess.run([ROOT / "script/setup"], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert result.stderr == ""
