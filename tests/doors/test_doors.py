"""No open door: the proxy and the web servers as they are shipped, asked from another host."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mail_pipelines import config, doors, home
from mail_pipelines.dispatch.servers import ServerInfo
from mail_pipelines.supervision import Processes
from tests.doors.stranger import Answer, Question
from tests.parts.hosts import Host, two_hosts
from tests.parts.processes import wait_for
from tests.production.test_units import INSTALLED

pytestmark = [pytest.mark.server, pytest.mark.timeout(900), pytest.mark.xdist_group("centre")]

ROOT = Path(__file__).resolve().parent.parent.parent
WORKSPACE, RUNTIME = "infra/dagster/production/workspace.yaml", "/run/mail-pipelines-code"
NAME = "mail.example.com"
OPERATOR, VIEWER = ("ann", "correct horse"), ("bob", "battery staple")
AREAS = {"dagster": OPERATOR, "viewer": VIEWER}
LOADED = "{ workspaceOrError { ... on Workspace { locationEntries { name loadStatus } } } }"
LAUNCH = """
mutation { launchRun(executionParams: {
  selector: {repositoryLocationName: "mail_pipelines", repositoryName: "__repository__", jobName: "maintenance"}, mode: "default"
}) { __typename } }
"""
RELOAD = """
mutation { reloadRepositoryLocation(repositoryLocationName: "mail_pipelines") {
  ... on WorkspaceLocationEntry { loadStatus locationOrLoadError { __typename } }
} }
"""
PLAN = """
{ executionPlanOrError(
  pipeline: {repositoryLocationName: "mail_pipelines", repositoryName: "__repository__", pipelineName: "maintenance"}, mode: "default"
) { __typename } }
"""
SUBSCRIPTION = 'subscription { pipelineRunLogs(runId: "none") { __typename } }'
# Listens at pairs of address and port, and hangs up on whoever connects.
LISTEN = """
import selectors, socket, sys
ready = selectors.DefaultSelector()
for address, port in zip(sys.argv[1::2], sys.argv[2::2]):
    ready.register(socket.create_server((address, int(port))), selectors.EVENT_READ)
while True:
    for key, _ in ready.select():
        key.fileobj.accept()[0].close()
"""


@dataclass
class Centre:
    """A host with the proxy, both web servers and the code server, and another host that asks it."""

    host: Host
    other: Host
    folder: Path
    environ: dict[str, str]
    processes: Processes

    def ask(self, *questions: Question) -> list[Answer]:
        given = json.dumps({"trusted": str(self.folder / "tls/fullchain.pem"), "questions": [asdict(question) for question in questions]})
        command = [*self.other.run, sys.executable, "-m", "tests.doors.stranger"]
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return [Answer(**answer) for answer in json.loads(done.stdout)]

    def graphql(self, area: str, query: str, login: tuple[str, str] | None = None) -> Any:
        (answer,) = self.ask(Question(NAME, path=f"/{area}/graphql", method="POST", body={"query": query}, login=login or AREAS[area]))
        assert answer.status == 200, answer
        return json.loads(answer.body)["data"]

    def plans(self, area: str) -> bool:
        """Whether a web server can say how a job would be executed, which the code server knows. An error of its has the status 500."""
        (answer,) = self.ask(Question(NAME, path=f"/{area}/graphql", method="POST", body={"query": PLAN}, login=AREAS[area]))
        return '"ExecutionPlan"' in answer.body

    def ports(self) -> list[int]:
        """Everything that is listened on, for whomever."""
        listed = subprocess.run([*self.host.run, "ss", "-Hltn"], capture_output=True, text=True, check=True).stdout
        return sorted({int(line.split()[3].rpartition(":")[2]) for line in listed.splitlines()})

    def wait_for_ports(self, *ports: int) -> None:
        pid = str(self.processes._children[-1].process.pid)
        wait_for(lambda: set(ports) <= {listener.port for listener in doors.listening(pid)}, what=f"ports {ports}")

    def start(self, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        return self.processes.start(name, [*self.host.run, *words], env=self.environ, log=self.folder / f"{name}.log")

    def newest_tick(self) -> float:
        """When a sensor was evaluated last (epoch seconds); 0: never."""
        with dg.DagsterInstance.from_config(self.environ["DAGSTER_HOME"]) as instance:
            sensors = instance.all_instigator_state()
            return max((tick.timestamp for one in sensors for tick in instance.get_ticks(one.instigator_origin_id, one.selector_id, limit=1)), default=0)

    def doctor(self) -> list[str]:
        """What `doctor` says of doors."""
        command = [*self.host.run, sys.executable, "-m", "mail_pipelines", "doctor"]
        said = subprocess.run(command, env=self.environ, capture_output=True, text=True, check=False).stdout.splitlines()
        return [line for line in said if line.startswith("doors: ")]


@pytest.fixture(scope="module")
def centre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Centre]:
    folder = tmp_path_factory.mktemp("centre")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAIL_PIPELINES_", "DAGSTER_"))}
    environ["MAIL_PIPELINES_HOME"] = str(folder / "home")
    home.make(environ)
    environ["MAIL_PIPELINES_METRICS__PORT"] = "9466"
    environ["DAGSTER_HOME"] = str(folder / "home" / "dagster")
    with ExitStack() as stack:
        host, other = stack.enter_context(two_hosts(f"{{address}} {NAME} elsewhere.example.com\n127.0.0.1 localhost\n"))
        running = Centre(host, other, folder, environ, stack.enter_context(Processes(stop_seconds=3)))
        shipped = (ROOT / WORKSPACE).read_text(encoding="utf-8")
        (folder / "workspace.yaml").write_text(shipped.replace(RUNTIME, str(folder)), encoding="utf-8")
        for unit in ("code", "metrics", "web", "viewer"):
            running.start(unit, command_of(unit, folder))
        running.start("nginx", ["nginx", "-c", str(proxy(folder))])
        running.wait_for_ports(443, 3000, 3001, 9466)
        query = {"method": "POST", "body": {"query": LOADED}, "until": '"LOADED"'}
        answers = running.ask(*(Question(NAME, path=f"/{area}/graphql", login=login, **query) for area, login in AREAS.items()))
        assert all('"LOADED"' in answer.body for answer in answers), answers
        yield running


def command_of(unit: str, folder: Path) -> list[str]:
    """What a unit starts; what is in /run on a real host is in `folder`."""
    text = (ROOT / f"infra/systemd/mail-pipelines-{unit}.service").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith("ExecStart="))
    elsewhere = {INSTALLED: str(Path(sys.executable).parent), WORKSPACE: str(folder / "workspace.yaml"), RUNTIME: str(folder)}
    for place, here in elsewhere.items():
        line = line.replace(place, here)
    return shlex.split(line.removeprefix("ExecStart="))


def proxy(folder: Path) -> Path:
    """The shipped configuration with certificate and logins, in a main file that uses nothing of the system's; returns that file."""
    (folder / "tls").mkdir()
    certificate(folder / "tls")
    for name, (person, password) in {"operators": OPERATOR, "viewers": VIEWER}.items():
        hashed = subprocess.run(["openssl", "passwd", "-6", password], capture_output=True, text=True, check=True).stdout
        (folder / name).write_text(f"{person}:{hashed}")
    shipped = (ROOT / "infra/nginx/mail-pipelines.conf").read_text(encoding="utf-8")
    (folder / "site.conf").write_text(shipped.replace("/etc/mail-pipelines/", f"{folder}/"))
    own = "".join(f"  {kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    main = folder / "nginx.conf"
    main.write_text(
        f"daemon off;\nuser root;\nworker_processes 1;\npid {folder}/nginx.pid;\nerror_log {folder}/error.log;\nevents {{}}\n"
        f"http {{\n  access_log {folder}/access.log;\n{own}  include {folder}/site.conf;\n}}\n"
    )
    return main


def certificate(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "fullchain.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "privkey.pem").write_bytes(plain)


def test_from_another_host_every_port_but_one_gives_nothing(centre: Centre) -> None:
    ports = centre.ports()
    assert {443, 3000, 3001, 9466} <= set(ports)
    answers = dict(zip(ports, centre.ask(*(Question(centre.host.address, port) for port in ports)), strict=True))
    assert {port: answer.status for port, answer in answers.items() if answer.status != "nothing"} == {443: "open"}


def test_without_a_login_the_proxy_gives_401_for_everything(centre: Centre) -> None:
    paths = ("/", "/dagster", "/dagster/", "/dagster/server_info", "/viewer", "/viewer/runs", "/metrics", "/api/", "/elsewhere")
    questions = [Question(NAME, path=path) for path in paths]
    for area in AREAS:
        questions += [
            Question(NAME, path=f"/{area}/graphql", method="POST", body={"query": LOADED}),
            Question(NAME, path=f"/{area}/graphql", subscription=SUBSCRIPTION),
            Question(NAME, path=f"/{area}/graphql", subscription=SUBSCRIPTION, login=("ann", "guessed")),
            Question(NAME, path=f"/{area}/report_asset_materialization/send_batches", method="POST", body={}),
        ]
    answers = centre.ask(*questions)
    assert [(question, answer) for question, answer in zip(questions, answers, strict=True) if answer.status != 401] == []
    assert answers[0].headers["strict-transport-security"]


def test_asked_for_another_name_it_does_not_even_show_a_certificate(centre: Centre) -> None:
    answers = centre.ask(Question("elsewhere.example.com", path="/"), Question(centre.host.address, path="/"))
    assert [answer.status for answer in answers] == ["nothing", "nothing"]
    assert all("UNRECOGNIZED_NAME" in answer.body.upper() for answer in answers), answers


@pytest.mark.parametrize("area", AREAS)
def test_with_a_login_pages_queries_and_subscriptions_work(centre: Centre, area: str) -> None:
    login = AREAS[area]
    page, subscribed = centre.ask(
        Question(NAME, path=f"/{area}/runs", login=login), Question(NAME, path=f"/{area}/graphql", subscription=SUBSCRIPTION, login=login)
    )
    assert page.status == 200
    assert f'"/{area}"' in page.body or f"/{area}/" in page.body
    assert subscribed.status == 101
    assert json.loads(subscribed.body)["payload"]["data"]["pipelineRunLogs"]["__typename"] == "PipelineRunLogsSubscriptionFailure"
    assert centre.graphql(area, "{ runsOrError { __typename } }") == {"runsOrError": {"__typename": "Runs"}}


def test_prometheus_asks_as_a_viewer(centre: Centre) -> None:
    (told,) = centre.ask(Question(NAME, path="/metrics", login=VIEWER))
    assert "\nmail_pipelines_database_reachable 1.0\n" in told.body


def test_a_viewers_login_is_no_operators(centre: Centre) -> None:
    assert [answer.status for answer in centre.ask(Question(NAME, path="/dagster/runs", login=VIEWER))] == [401]


def test_a_killed_code_server_that_is_started_again_is_found_by_daemon_and_web_servers(centre: Centre) -> None:
    """As systemd starts it again. The button in the UI then loads its definitions anew."""
    daemon = centre.start("daemon", command_of("daemon", centre.folder))
    wait_for(lambda: centre.newest_tick() > 0, what="a sensor")
    (code,) = (child.process for child in centre.processes._children if child.name == "code")
    code.kill()
    code.wait()
    assert not centre.plans("viewer")
    again = time.time()
    centre.start("code", command_of("code", centre.folder))
    for area in AREAS:
        wait_for(lambda area=area: centre.plans(area), what=area)  # type: ignore[misc]
    wait_for(lambda: centre.newest_tick() > again, what="a sensor")
    assert daemon.poll() is None
    daemon.terminate()
    daemon.wait(120)
    reloaded = centre.graphql("dagster", RELOAD)["reloadRepositoryLocation"]
    assert reloaded == {"loadStatus": "LOADED", "locationOrLoadError": {"__typename": "RepositoryLocation"}}
    assert centre.plans("dagster")


def test_an_operator_starts_a_run_and_a_viewer_does_not(centre: Centre) -> None:
    assert centre.graphql("viewer", LAUNCH)["launchRun"]["__typename"] == "UnauthorizedError"
    report = Question(NAME, path="/viewer/report_asset_materialization/send_batches", method="POST", body={}, login=VIEWER)
    assert [answer.status for answer in centre.ask(report)] == [401]
    assert centre.graphql("viewer", "{ runsOrError { ... on Runs { count } } }")["runsOrError"]["count"] == 0
    assert centre.graphql("dagster", LAUNCH)["launchRun"]["__typename"] == "LaunchRunSuccess"


def test_another_site_commands_nothing_with_the_login_of_a_browser(centre: Centre) -> None:
    """Forms and addresses would reach Dagster without the browser asking first."""
    command = "/dagster/graphql?query=mutation%7B__typename%7D"
    form = {"Content-Type": "text/plain"}
    questions = [
        Question(NAME, path=command, method="POST", headers=form | {"Origin": "https://evil.example.com"}, login=OPERATOR),
        Question(NAME, path=command, method="POST", headers=form | {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, login=OPERATOR),
        Question(NAME, path="/dagster/graphql", subscription=SUBSCRIPTION, headers={"Origin": "https://evil.example.com"}, login=OPERATOR),
        Question(NAME, path="/dagster/runs", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, login=OPERATOR),
        Question(NAME, path=command, headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, login=OPERATOR),
        # Its own pages, and links that are followed.
        Question(NAME, path=command, method="POST", headers=form | {"Origin": f"https://{NAME}", "Sec-Fetch-Site": "same-origin"}, login=OPERATOR),
        Question(NAME, path="/dagster/runs", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, login=OPERATOR),
    ]
    assert [answer.status for answer in centre.ask(*questions)] == [403, 403, 403, 403, 405, 200, 200]


def test_doctor_names_each_door_that_is_open(centre: Centre, tmp_path: Path) -> None:
    assert centre.doctor() == []
    empty = tmp_path / "empty.py"
    empty.write_text("import dagster\n\ndefs = dagster.Definitions()\n")
    # Of 4369 no other host hears, and 8080 is somebody else's.
    centre.start("others", [sys.executable, "-c", LISTEN, "0.0.0.0", "15672", centre.host.address, "25672", "127.0.0.2", "4369", "0.0.0.0", "8080"])
    centre.start("open web", [str(Path(sys.executable).parent / "dagster-webserver"), "-f", str(empty), "-h", "0.0.0.0", "-p", "3333"])
    centre.wait_for_ports(3333, 8080)
    assert centre.doctor() == [
        "doors: a web server of Dagster is open to other hosts at 0.0.0.0:3333",
        "doors: RabbitMQ's management page is open to other hosts at 0.0.0.0:15672",
        f"doors: RabbitMQ's port for other nodes is open to other hosts at {centre.host.address}:25672",
    ]


def test_a_server_is_for_its_own_host_and_a_database_for_those_that_need_it() -> None:
    listeners = [doors.Listener(ipaddress.ip_address("::"), port, 0) for port in (2601, 3306)]
    listeners.append(doors.Listener(ipaddress.ip_address("::ffff:127.0.0.1"), 2602, 0))
    registered = [
        ServerInfo(1, "mx1", "exim", "active", 1, "::", 2601, None, None, None),
        ServerInfo(2, "mx2", "exim", "active", 1, "::", 2602, None, None, None),
    ]

    def found(**environ: str) -> list[str]:
        settings = config.load({"MAIL_PIPELINES_HOME": "/home", **environ})
        return [f"{door.what} {door.listener}" for door in doors.open_doors(settings, registered, listeners)]

    database = {"MAIL_PIPELINES_DATABASE__URL": "mysql+pymysql://mail@localhost/mail"}
    assert found() == ["server mx1 [::]:2601"]
    assert found(**database) == ["server mx1 [::]:2601", "the database [::]:3306"]
    assert found(**database, MAIL_PIPELINES_BROKER__URL="filesystem:///broker") == ["server mx1 [::]:2601", "the database [::]:3306"]
    assert found(**database, MAIL_PIPELINES_BROKER__URL="amqp://centre@localhost/mail") == ["server mx1 [::]:2601"]


@pytest.mark.parametrize(("address", "is_a_door"), [("0.0.0.0", True), ("::", True), ("9.9.9.9", True), ("10.0.0.7", False), ("fd00::7", False)])
def test_metrics_are_for_private_networks(address: str, is_a_door: bool) -> None:
    settings = config.load({"MAIL_PIPELINES_HOME": "/home", "MAIL_PIPELINES_METRICS__PORT": "9466"})
    found = list(doors.open_doors(settings, [], [doors.Listener(ipaddress.ip_address(address), 9466, 0)]))
    assert [door.what for door in found] == ["metrics"] * is_a_door
