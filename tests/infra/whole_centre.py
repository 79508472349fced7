"""The same tests with every unit, and a run that Dagster executes there: `script/centre`. They take minutes of the processor, so no other command runs them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.infra.installing import PUBLIC, Installation
from tests.infra.machine import Machine
from tests.infra.test_centre import *  # noqa: F403
from tests.infra.test_centre import CA
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

LAUNCH = """mutation { launchRun(executionParams: {
  selector: {repositoryLocationName: "mail_pipelines", repositoryName: "__repository__", jobName: "maintenance"}, mode: "default"
}) { ... on LaunchRunSuccess { run { runId } } } }"""
STATUS = '{ runOrError(runId: "%s") { ... on Run { status } } }'


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return {}


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
