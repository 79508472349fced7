"""An internet of its own for one Exim: run inside a network namespace whose resolver is 10.9.9.1, with a DNS server, two mail
exchangers and an Exim that finds them by MX. Prints as JSON, for each mode, what the journal says of a message to each domain.

Arguments: a folder that every user may pass.
"""

from __future__ import annotations

import asyncio
import json
import smtplib
import sys
import time
from collections import Counter
from pathlib import Path

from mail_pipelines.dispatch import permit
from mail_pipelines.dispatch.exim import instance, log, runners
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.dispatch.gate import Gate
from mail_pipelines.dispatch.journal import Journal
from mail_pipelines.dispatch.pacer import Pacer
from mail_pipelines.messages.tokens import DeliveryToken, sign_delivery
from tests.dispatch.test_smtp import GOOD, serve
from tests.parts.dns import Zone, serving
from tests.parts.processes import listens, wait_for

RESOLVER, FIRST, SECOND, DEAD, SIX = "10.9.9.1", "10.9.9.2", "10.9.9.3", "10.9.9.4", "fd00::9"
ADDRESSES = (RESOLVER, FIRST, SECOND, DEAD, SIX)
RECORDS = (
    f"mx1.host.test. 60 IN A {FIRST}",
    f"mx2.host.test. 60 IN A {SECOND}",
    # Nobody listens there.
    f"dead.host.test. 60 IN A {DEAD}",
    "local.host.test. 60 IN A 127.0.0.1",
    f"dual.host.test. 60 IN A {FIRST}",
    f"dual.host.test. 60 IN AAAA {SIX}",
    "plain.test. 60 IN MX 10 mx1.host.test.",
    "dual.test. 60 IN MX 10 dual.host.test.",
    "backup.test. 60 IN MX 10 dead.host.test.",
    "backup.test. 60 IN MX 20 mx2.host.test.",
    f"address-only.test. 60 IN A {FIRST}",
    "takes-none.test. 60 IN MX 0 .",
    "dead.test. 60 IN MX 10 dead.host.test.",
    "ours.test. 60 IN MX 10 local.host.test.",
    "broken-mx.test. 60 IN MX 10 nowhere.host.test.",
)
DOMAINS = ("plain", "dual", "backup", "address-only", "takes-none", "dead", "ours", "broken-mx", "not-registered", "failing")


async def main(folder: Path) -> None:
    zone = Zone()
    zone.publish(*RECORDS)
    zone.failing.add("failing.test")
    received: dict[str, list[bytes]] = {FIRST: [], SECOND: [], SIX: []}
    servers = [await serve(GOOD, received[address], port=25, host=address) for address in received]
    folders = ServerFolders(folder / "run", folder / "log", folder / "mail")
    binary = instance.find_binary()
    own = instance.Instance(binary, instance.account_for(binary), folders, "127.0.0.1", 2500, "mail.example.test", interface=RESOLVER)
    instance.prepare(own)
    with serving(zone, RESOLVER, 53):
        daemon = instance.start(own, folders.log / "exim.out")
        serving_queues = asyncio.create_task(runners.serve(own, daemon.pid, own.speakers[0]))
        try:
            await asyncio.to_thread(wait_for, lambda: listens(own.port) and own.folders.journal.exists(), what="Exim")
            outcomes: dict[str, dict[str, list[object]]] = {"cutthrough": {}, "burst": {}}
            for mode, of_mode in outcomes.items():
                for number, domain in enumerate(DOMAINS, 1):
                    before = Counter({address: len(bodies) for address, bodies in received.items()})
                    outcome = await _send(own, f"someone@{domain}.test", number, mode)
                    at = [address for address, bodies in received.items() if len(bodies) > before[address]]
                    of_mode[domain] = [*outcome, at]
            sys.stdout.write(json.dumps(outcomes))
        finally:
            serving_queues.cancel()
            await asyncio.to_thread(instance.stop, daemon.pid)
            daemon.wait()
    for server in servers:
        server.close()


async def _send(own: instance.Instance, recipient: str, number: int, mode: str) -> tuple[str, str | None, str]:
    """Kind, enhanced code and text of the outcome that the journal has for one message."""
    token = sign_delivery(DeliveryToken(1, number, 0), b"a key for tests")
    journal = Journal(own.folders.journal, log.parse, log.continues)
    position = journal.end()
    granted = permit.grant(own.folders.permits, number, seconds=600)
    try:
        if mode == "burst":
            await _through_queue(own, granted.name, recipient, token)
        else:
            await asyncio.to_thread(_offer, own, granted.name, recipient, token)
    finally:
        granted.release()
    evidence = journal.evidence(position, number)
    outcome = evidence.outcomes[token]
    assert (evidence.alarms, evidence.unknown_forms) == (0, 0)
    return str(outcome.kind), outcome.enhanced, outcome.text


def _offer(own: instance.Instance, greeting: str, recipient: str, token: str) -> None:
    try:
        with smtplib.SMTP(own.address, own.port, local_hostname=greeting, timeout=120) as client:
            client.sendmail(f"b+{token}@bounces.example.test", [recipient], b"Subject: x\r\n\r\nHello.\r\n")
    except smtplib.SMTPException:
        pass


async def _through_queue(own: instance.Instance, name: str, recipient: str, token: str) -> None:
    folder = own.folders.gates / "other"
    folder.mkdir(exist_ok=True)
    pacer = Pacer(own.folders.pacers, "other", per_second=100, connections=1)
    gate = Gate(folder, name, [token], pacer, time.monotonic() + 600)
    await gate.open()
    await asyncio.to_thread(_offer, own, f"{name}.other", recipient, token)
    while list(own.spool.glob("other/input/*-D")):
        await runners.run_queue(own.folders.runners, "other", 10)
    await gate.close()
    pacer.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
