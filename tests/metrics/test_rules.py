"""The alerts: they come when they should, ask about what is told, and each is explained."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
RULES = ROOT / "infra/prometheus/rules.yml"
CASES = Path(__file__).with_name("alerts.yml")


def alerts() -> dict[str, Any]:
    (group,) = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def asked_of() -> set[str]:
    """The metrics that rules ask about, but for Prometheus' own."""
    return {name for rule in alerts().values() for name in re.findall(r"mail_pipelines_\w+", rule["expr"])}


@pytest.mark.server
def test_each_alert_comes_when_it_should_and_not_else(tmp_path: Path) -> None:
    for file in (RULES, CASES, RULES.with_name("prometheus.yml")):
        shutil.copy(file, tmp_path)
    for words in (["test", "rules", "alerts.yml"], ["check", "config", "prometheus.yml"]):
        done = subprocess.run(["promtool", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_case_and_says_what_to_do() -> None:
    cases = CASES.read_text(encoding="utf-8")
    named = {name for name in alerts() if f'alertname="{name}"' in cases}
    named |= {f"MailPipelines{name}" for match in re.findall(r"\.\*\(([\w|]+)\)", cases) for name in match.split("|")}
    assert named == set(alerts())
    page = (ROOT / "docs/production.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(MailPipelines\w+)` \|", page, re.MULTILINE) == list(alerts())
