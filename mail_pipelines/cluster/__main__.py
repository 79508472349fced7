"""Production on this machine: a centre and three dispatch servers send two campaigns at once. Run by `script/cluster`.

MariaDB, RabbitMQ, Dagster, and for each server Exim, a worker and the destinations behind it, all with folders, accounts and ports of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack, suppress

from rich.console import Console

from mail_pipelines.cluster import campaigns, destinations, hosts, running, verdict, watch
from mail_pipelines.cluster.hosts import SERVERS, Centre, Server
from mail_pipelines.cluster.verdict import Verdict
from mail_pipelines.database.engine import reading
from mail_pipelines.demo.reporting import reported
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.supervision import Processes, Stopped

_REPORT_SECONDS = 180
_LEAST_RECIPIENTS = 1_000

console = Console(stderr=True, soft_wrap=True)


def send(centre: Centre, fleet: list[Server]) -> Verdict:
    """Start both campaigns, wait for their end, and count."""
    for text in campaigns.CAMPAIGNS:
        campaigns.start(centre.engine, centre.settings, text)
    watch.until_over(centre.engine, centre.processes, console, campaigns.KEYS, SERVERS)
    with console.status("waiting for the results in Dagster"):
        for key in campaigns.KEYS:
            centre.processes.wait_until_ready(lambda key=key: reported(centre.settings, key), seconds=_REPORT_SECONDS, what=f"the results of {key}")  # type: ignore[misc]
    with console.status("counting at the destinations"):
        arrived = {server.name: destinations.count(server.destinations, server.settings.token_key()) for server in fleet}
        with reading(centre.engine) as connection:
            return verdict.judge(connection, campaigns.KEYS, arrived)


def run(recipients: int, *, as_json: bool, stay: bool) -> None:
    """Raises `MailPipelinesError` if not everything agrees, or something does not work."""
    begin = time.monotonic()
    with running.alone(), running.folders(console) as (folder, run_folder), Processes() as processes, ExitStack() as stack:
        centre, fleet = running.start(folder, run_folder, SERVERS, processes, stack, console)
        with console.status(f"importing {recipients:,} contacts"):
            campaigns.prepare(centre.engine, centre.settings, centre.settings.home / "files", recipients, processes.check)
            campaigns.limit(centre.engine, list(SERVERS), recipients)
        with console.status("starting Dagster"):
            address = centre.start_dagster()
            hosts.wait(processes, centre, fleet)
        console.print(f"Dagster is at [bold]{address}[/bold]; everything is up after {time.monotonic() - begin:.0f} s")
        found = send(centre, fleet)
        console.print(verdict.table(found))
        for line in verdict.lines(found):
            console.print(line, markup=False)
        if as_json:
            places = {"ui": address, "folder": str(folder), "destinations": {server.name: str(server.destinations.mail) for server in fleet}}
            sys.stdout.write(json.dumps(found.to_document() | places) + "\n")
            sys.stdout.flush()
        if stay:
            console.print(f"Dagster is at [bold]{address}[/bold]. Ctrl-C ends it.")
            with suppress(Stopped):
                processes.wait()
        if found.disagreements:
            raise MailPipelinesError(f"{len(found.disagreements)} disagreements")


def main() -> int:
    """The exit status: 0 if everything agrees, 1 if not, 130 if it was stopped before that was known."""
    parser = argparse.ArgumentParser(prog="script/cluster", description=__doc__)
    parser.add_argument("--recipients", type=int, default=200_000, help="of both campaigns together (default 200,000)")
    parser.add_argument("--exit", action="store_true", help="end when everything is counted, instead of leaving the UI up until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="end standard output with one line of JSON")
    options = parser.parse_args()
    if options.recipients < _LEAST_RECIPIENTS:
        parser.error(f"--recipients is {options.recipients}; expected at least {_LEAST_RECIPIENTS}")
    try:
        run(options.recipients, as_json=options.json, stay=not options.exit)
    except Stopped:
        return 130
    except MailPipelinesError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
