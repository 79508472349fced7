"""A centre and two dispatch servers as in production, on this host: daemon, web server, and a worker for each, around one broker."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
import sqlalchemy as sa
import yaml
from celery import Celery
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin

from mail_pipelines import home, up
from mail_pipelines.campaigns.progress import Totals
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Claim, Delivery, Server, State
from mail_pipelines.supervision import Child, Processes
from tests.e2e.platform import Platform
from tests.parts.processes import wait_for

if TYPE_CHECKING:
    from tests.production.backing import Backing

CONTACTS = 2_000
DEFINITIONS = "mail_pipelines.definitions"
FINISHED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
SERVERS = ("catcher-1", "catcher-2")
TERMINATE = "mutation($run: String!) { terminateRun(runId: $run) { __typename ... on PythonError { message } } }"


@dataclass
class Fleet:
    """A platform whose runs execute in workers."""

    platform: Platform
    instance: dg.DagsterInstance
    app: Celery
    backing: Backing
    _begun: set[str] = field(default_factory=set)

    @property
    def processes(self) -> Processes:
        return self.platform.processes

    # --- processes --------------------------------------------------------------------------------------------------

    def start_worker(self, name: str, server: str | None, *options: str) -> None:
        """A worker as systemd starts it: by the command, with its server's name in the environment."""
        command = [sys.executable, "-m", "mail_pipelines", "worker", "run", *options]
        self.processes.start(name, command, env=self.environ(server), log=self.log(name))

    def environ(self, server: str | None) -> dict[str, str]:
        """What the processes of a server's host are configured with, or those of the centre."""
        environ = dict(self.platform.environ)
        if server:
            environ |= {"MAIL_PIPELINES_SERVER": server, **self.backing.of_server.get(server, {})}
            # The centre's alone.
            environ |= dict.fromkeys(("MAIL_PIPELINES_BROKER__SIGNING_KEY", "MAIL_PIPELINES_BROKER__MANAGEMENT_URL"), "")
        return environ

    def restart_catcher(self, name: str) -> None:
        """The server's mail catcher, as a process of its own host."""
        self.end(name)
        self.processes.start(name, [sys.executable, "-m", "mail_pipelines", "catcher", "run", name], env=self.environ(name), log=self.log(name))

    def wait_for_worker(self, name: str, times: int = 1) -> None:
        """Until it has begun to work for so many times."""
        wait_for(lambda: self.log(name).read_text().count(" ready.") >= times, what=f"the {name}")

    def restart_worker(self, server: str | None) -> None:
        """As an update of its host does: its sessions end in order, and another process comes."""
        name = f"worker of {server or 'the centre'}"
        self.end(name)
        self.start_worker_again(name, server)

    def start_worker_again(self, name: str, server: str | None) -> None:
        """Once more, and wait until it works."""
        times = self.log(name).read_text().count(" ready.")
        self.start_worker(name, server)
        self.wait_for_worker(name, times + 1)

    def log(self, name: str) -> Path:
        return self.platform.settings.home / "log" / f"{name}.log"

    def child(self, name: str) -> Child:
        return next(child for child in self.processes._children if child.name == name)

    def end(self, name: str, number: int = signal.SIGTERM) -> None:
        """End a process by its id and wait for it."""
        child = self.child(name)
        child.process.send_signal(number)
        child.process.wait(120)
        self.processes._children.remove(child)

    def restart_dagster(self) -> None:
        """Kill daemon, web server and code server, and start them again."""
        for name in ("daemon", "web", "code"):
            self.end(name, signal.SIGKILL)
        self.platform.start_dagster()

    # --- runs -------------------------------------------------------------------------------------------------------

    def runs(self, job: str, since: float = 0, **tags: str) -> list[dg.RunRecord]:
        records = self.instance.get_run_records(dg.RunsFilter(job_name=job, tags=tags))
        return [record for record in records if record.create_timestamp.timestamp() >= since]

    def send_runs(self, campaign: str) -> list[dg.RunRecord]:
        return self.runs("send_campaign", **{"dagster/partition/campaign": campaign})

    def wait_for_ends(self, campaign: str) -> None:
        """Until no send run of a campaign works, says Dagster."""

        def working() -> list[str]:
            return [record.dagster_run.run_id for record in self.send_runs(campaign) if not record.dagster_run.is_finished]

        said = "end of {} ({}):\n{}"
        wait_for(
            lambda: not working(),
            what=lambda: "\n".join(said.format(run_id, self.status(run_id), self.messages(run_id)) for run_id in working()),
        )

    def begin(self, campaign: str, per_second: float) -> None:
        """Let a campaign begin, sent so slowly, unless it has."""
        if campaign not in self._begun:
            self._begun.add(campaign)
            self.platform.limit(per_second)
            self.schedule(campaign)

    def schedule(self, campaign: str) -> None:
        self.platform.schedule(campaign)

    def add_run(self, job: str, **tags: str) -> str:
        """A run that Dagster knows and nobody has ordered."""
        origin = JobPythonOrigin(job, RepositoryPythonOrigin(sys.executable, ModuleCodePointer(DEFINITIONS, "defs", None), None, None, None))
        return self.instance.add_run(dg.DagsterRun(job_name=job, tags=tags, job_code_origin=origin)).run_id

    def launch(self, job: str, **tags: str) -> str:
        return up.launch(self.platform.address, job, tags)

    def terminate(self, run_id: str) -> None:
        done = self.platform.graphql(TERMINATE, {"run": run_id})["terminateRun"]
        # It may have ended meanwhile.
        assert done["__typename"] == "TerminateRunSuccess" or self.status(run_id) in FINISHED, done

    def status(self, run_id: str) -> dg.DagsterRunStatus:
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        return run.status

    def wait_for_status(self, run_id: str, status: dg.DagsterRunStatus) -> dg.DagsterRun:
        wait_for(lambda: self.status(run_id) is status, what=lambda: f"{status} of {run_id}, which is {self.status(run_id)}")
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        return run

    def messages(self, run_id: str) -> str:
        """What Dagster's log of a run says."""
        entries = self.instance.all_logs(run_id)
        return "\n".join(entry.user_message or (entry.dagster_event.message if entry.dagster_event else None) or "" for entry in entries)

    def sending(self, campaign: str) -> dg.DagsterRun:
        """A run that is sending the campaign at this moment, with messages under way."""
        run = wait_for(lambda: next(self._sending(campaign), None), what=f"a session that sends {campaign}")
        before = len(self.platform.copies(campaign))
        wait_for(lambda: len(self.platform.copies(campaign)) > before + 10, what="messages under way")
        return run

    def busy(self) -> set[str]:
        """Servers that have messages under way."""
        with reading(self.platform.engine) as connection:
            claimed = sa.select(Server.key).join(Claim, Claim.server_id == Server.id).where(Claim.state == "open").distinct()
            return set(connection.execute(claimed).scalars())

    def _sending(self, campaign: str) -> Iterator[dg.DagsterRun]:
        with reading(self.platform.engine) as connection:
            busy = set(connection.execute(sa.select(Claim.run_id).where(Claim.state == "open")).scalars())
        for record in self.send_runs(campaign):
            run = record.dagster_run
            if run.status is dg.DagsterRunStatus.STARTED and run.run_id in busy:
                yield run

    def quicken(self, campaign: str) -> None:
        """Send the rest at full speed: sessions that begin from now on do."""
        self.platform.limit()
        for record in self.send_runs(campaign):
            if record.dagster_run.status is dg.DagsterRunStatus.STARTED:
                self.terminate(record.dagster_run.run_id)

    def process_of(self, run_id: str) -> int:
        """The process that Dagster's log names for a run."""
        found = re.search(r"process \(pid: ([0-9]+)\)", self.messages(run_id))
        assert found is not None
        return int(found[1])

    # --- ledger -----------------------------------------------------------------------------------------------------

    def rows_of_run(self, run_id: str) -> dict[State, int]:
        """Rows of a run's claims that are claimed or unknown."""
        with reading(self.platform.engine) as connection:
            rows = connection.execute(
                sa.select(Delivery.state, sa.func.count())
                .join(Claim, Claim.id == Delivery.claim_id)
                .where(Claim.run_id == run_id, Delivery.state.in_((int(State.CLAIMED), int(State.UNKNOWN))))
                .group_by(Delivery.state)
            )
            return {State(state): count for state, count in rows}

    def open_claims(self, run_id: str) -> int:
        with reading(self.platform.engine) as connection:
            return connection.execute(sa.select(sa.func.count()).where(Claim.run_id == run_id, Claim.state != "closed")).scalar_one()

    def holds_promise(self, campaign: str, *, unknown: int = 0) -> None:
        """Promise 1 at the far end: every recipient accounted for, and nobody has two copies."""
        totals = wait_for(lambda: self._over(campaign), seconds=300, what=f"campaign {campaign}")
        copies = self.platform.copies(campaign)
        assert set(copies.values()) == {1}
        assert totals.delivered <= len(copies) <= totals.delivered + totals.unknown
        assert totals.unknown <= unknown
        assert totals.audience == totals.delivered + totals.bounced + totals.suppressed + totals.unknown
        assert totals.audience > CONTACTS // 2

    def _over(self, campaign: str) -> Totals | None:
        """The totals, when nothing but unknown rows is open."""
        if self.platform.campaign(campaign).state not in ("sending", "finished"):
            return None
        totals = self.platform.totals(campaign)
        return totals if totals.audience and totals.open == totals.unknown else None


def dagster_yaml(folder: Path, *, embedded: bool) -> None:
    """The file as it is shipped but for shorter times; `embedded` keeps Dagster's storage in SQLite."""
    document = yaml.safe_load((home.checkout() / "infra/dagster/production/dagster.yaml").read_text(encoding="utf-8"))
    if embedded:
        del document["storage"]
    document["run_monitoring"] |= {"poll_interval_seconds": 2}
    place = folder / "dagster" / "dagster.yaml"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(yaml.safe_dump(document), encoding="utf-8")
