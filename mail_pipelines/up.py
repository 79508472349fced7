"""What `mail-pipelines up` runs: Dagster's web server and daemon, and built-in mail catchers where no real server is registered.

Web server and daemon share one code server. Left to themselves each would start its own, and the daemon a new one every minute.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from sqlalchemy.engine import Engine

from mail_pipelines import code_server
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import reading
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.files import ServerFolders, is_locked
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.free_ports import check_port, free_port
from mail_pipelines.home import environment
from mail_pipelines.supervision import Processes

LOOPBACK = "127.0.0.1"
# Whoever waits hears at once of a child that ends: this is for a host that is busy with something else.
START_SECONDS = 300
_ANSWER_SECONDS = 10
# Who asks again does not know whether there are two runs then.
_LAUNCH_SECONDS = 120
LOAD_QUERY = "{ workspaceOrError { ... on Workspace { locationEntries { name loadStatus locationOrLoadError { ... on PythonError { message } } } } } }"
_LAUNCH = """
mutation($job: String!, $tags: [ExecutionTag!]!) {
  launchRun(executionParams: {
    selector: {repositoryLocationName: "mail_pipelines", repositoryName: "__repository__", jobName: $job}, mode: "default", executionMetadata: {tags: $tags}
  }) { __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } }
}
"""


class UpError(MailPipelinesError):
    """The web server cannot be started, the definitions do not load, or a run cannot be launched."""


def lock(home: Path) -> Path:
    """Two daemons on one Dagster home would launch everything twice: this file says that one runs."""
    return home / "up.lock"


def start_dagster(processes: Processes, settings: Settings) -> str:
    """Start the code server, the daemon and the web server, wait until the UI answers, and return its address."""
    address = begin_dagster(processes, settings)
    wait_for_ui(processes, address)
    return address


def begin_dagster(processes: Processes, settings: Settings) -> str:
    """Start them, and return the address at which the UI will answer."""
    host, port = settings.operation.ui_host, _ui_port(settings)
    _start_code(processes, settings)
    start_daemon(processes, settings)
    _start(processes, settings, "web", ["mail_pipelines.dagster_process", "web", "-w", str(_workspace(settings)), "-h", host, "-p", str(port)])
    return f"http://{'[' + host + ']' if ':' in host else host}:{port}"


def wait_for_ui(processes: Processes, address: str) -> None:
    """Wait until the UI answers. Raises `UpError` if the definitions cannot be loaded."""
    processes.wait_until_ready(lambda: _loaded(address), seconds=START_SECONDS, what="the Dagster UI")


def _start_code(processes: Processes, settings: Settings) -> None:
    """Start the code server and wait until it has loaded the definitions."""
    port = free_port(LOOPBACK)
    place = {"host": LOOPBACK, "port": port, "location_name": code_server.LOCATION}
    _workspace(settings).write_text(yaml.safe_dump({"load_from": [{"grpc_server": place}]}), encoding="utf-8")
    _start(processes, settings, "code", ["mail_pipelines.code_server", LOOPBACK, str(port)])
    processes.wait_until_ready(lambda: listens(port), seconds=START_SECONDS, what="the code server")


def start_daemon(processes: Processes, settings: Settings) -> None:
    """Start the daemon, which needs the code server."""
    _start(processes, settings, "daemon", ["mail_pipelines.dagster_process", "daemon", "-w", str(_workspace(settings))])


def _workspace(settings: Settings) -> Path:
    """The file that tells web server and daemon where the code server is."""
    return settings.dagster_home / "workspace.yaml"


def catchers(engine: Engine, settings: Settings) -> list[str]:
    """The built-in catchers to start here: those that are registered and do not run, or on an installation without any server those of `server.catchers`."""
    with reading(engine) as connection:
        known = servers.all_servers(connection)
    if not known:
        return list(settings.server.catchers)
    found = [server.key for server in known if server.kind == "catcher" and server.state not in ("retired", "lost")]
    # One that was made by `server provision` goes on when `up` has ended.
    return [key for key in found if not is_locked(ServerFolders.of(settings.server, key).log / "lock")]


def start_catcher(processes: Processes, engine: Engine, settings: Settings, name: str) -> None:
    """Register a catcher on a free port of the loopback and start it there."""
    servers.register(engine, name, kind="catcher", host=LOOPBACK, port=free_port(LOOPBACK), now=dt.datetime.now(dt.UTC))
    _start(processes, settings, name, ["mail_pipelines", "catcher", "run", name])


def _start(processes: Processes, settings: Settings, name: str, module: list[str]) -> None:
    processes.start(name, [sys.executable, "-m", *module], env={**os.environ, **environment(settings)}, log=settings.home / "log" / f"{name}.log")


def listens(port: int) -> bool:
    """Whether anybody listens on a port of the loopback."""
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def _ui_port(settings: Settings) -> int:
    host, port = settings.operation.ui_host, settings.operation.ui_port
    try:
        if port == 0:
            return free_port(host)
        check_port(host, port)
        return port
    except OSError as error:
        # Python adds words of its own to `strerror`.
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UpError(f"the UI cannot listen on {host} port {port}: {reason}; set operation.ui_host and operation.ui_port") from error


def graphql(address: str, query: str, variables: Mapping[str, object] | None = None, *, seconds: float = _ANSWER_SECONDS) -> Any:
    """Ask the web server at an address; raises `OSError` if it does not answer within so many seconds."""
    body = json.dumps({"query": query, "variables": variables or {}}).encode()
    request = urllib.request.Request(f"{address}/graphql", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=seconds) as reply:
        return json.load(reply)["data"]


def launch(address: str, job: str, tags: Mapping[str, str] | None = None) -> str:
    """Launch a job by the web server at an address, and return the id of the run. Raises `UpError`."""
    given = [{"key": key, "value": value} for key, value in (tags or {}).items()]
    try:
        done = graphql(address, _LAUNCH, {"job": job, "tags": given}, seconds=_LAUNCH_SECONDS)["launchRun"]
    except OSError as error:
        raise UpError(f"{job} could not be launched: the web server at {address} does not answer: {error}") from error
    if done["__typename"] != "LaunchRunSuccess":
        raise UpError(f"{job} could not be launched: {done}")
    return str(done["run"]["runId"])


def _loaded(address: str) -> bool:
    """Whether the UI answers and has loaded the definitions; raises `UpError` if they cannot be loaded."""
    try:
        entries = graphql(address, LOAD_QUERY)["workspaceOrError"]["locationEntries"]
    except OSError:
        return False
    for entry in entries:
        if message := (entry["locationOrLoadError"] or {}).get("message"):
            raise UpError(f"the definitions of {entry['name']} cannot be loaded: {message.strip()}")
    return all(entry["loadStatus"] == "LOADED" for entry in entries)
