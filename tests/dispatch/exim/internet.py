"""An internet of its own for one Exim: run inside a network namespace whose resolver is 10.9.9.1, with a DNS server, two mail
exchangers and an Exim that finds them by MX. Prints as JSON what the journal says of a message to each domain.

Arguments: a folder that every user may pass.
"""

from __future__ import annotations

import asyncio
import json
import smtplib
import sys
from collections import Counter
from pathlib import Path

from mail_pipelines.dispatch import permit
from mail_pipelines.dispatch.exim import instance, log
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.dispatch.journal import Journal
from mail_pipelines.messages.tokens import DeliveryToken, sign_delivery
from tests.dispatch.test_smtp import GOOD, serve
from tests.parts.dns import Zone, serving
from tests.parts.processes import listens, wait_for

RESOLVER, FIRST, SECOND, DEAD = "10.9.9.1", "10.9.9.2", "10.9.9.3", "10.9.9.4"
ADDRESSES = (RESOLVER, FIRST, SECOND, DEAD)
RECORDS = (
    f"mx1.host.test. 60 IN A {FIRST}",
    f"mx2.host.test. 60 IN A {SECOND}",
    # Nobody listens there.
    f"dead.host.test. 60 IN A {DEAD}",
    "local.host.test. 60 IN A 127.0.0.1",
    "plain.test. 60 IN MX 10 mx1.host.test.",
    "backup.test. 60 IN MX 10 dead.host.test.",
    "backup.test. 60 IN MX 20 mx2.host.test.",
    f"address-only.test. 60 IN A {FIRST}",
    "takes-none.test. 60 IN MX 0 .",
    "dead.test. 60 IN MX 10 dead.host.test.",
    "ours.test. 60 IN MX 10 local.host.test.",
    "broken-mx.test. 60 IN MX 10 nowhere.host.test.",
)
DOMAINS = ("plain", "backup", "address-only", "takes-none", "dead", "ours", "broken-mx", "not-registered", "failing")


async def main(folder: Path) -> None:
    zone = Zone()
    zone.publish(*RECORDS)
    zone.failing.add("failing.test")
    received: dict[str, list[bytes]] = {FIRST: [], SECOND: []}
    servers = [await serve(GOOD, received[address], port=25, host=address) for address in received]
    folders = ServerFolders(folder / "run", folder / "log", folder / "mail")
    binary = instance.find_binary()
    own = instance.Instance(binary, instance.account_for(binary), folders, "127.0.0.1", 2500, "mail.example.test")
    instance.prepare(own)
    with serving(zone, RESOLVER, 53):
        daemon = instance.start(own, folders.log / "exim.out")
        try:
            await asyncio.to_thread(wait_for, lambda: listens(own.port), what="Exim")
            outcomes = {}
            for number, domain in enumerate(DOMAINS, 1):
                before = Counter({address: len(bodies) for address, bodies in received.items()})
                outcome = await asyncio.to_thread(_send, own, f"someone@{domain}.test", number)
                at = [address for address, bodies in received.items() if len(bodies) > before[address]]
                outcomes[domain] = [*outcome, at]
            sys.stdout.write(json.dumps(outcomes))
        finally:
            await asyncio.to_thread(instance.stop, daemon.pid)
            daemon.wait()
    for server in servers:
        server.close()


def _send(own: instance.Instance, recipient: str, number: int) -> tuple[str, str | None, str]:
    """Kind, enhanced code and text of the outcome that the journal has for one message."""
    token = sign_delivery(DeliveryToken(1, number, 0), b"a key for tests")
    journal = Journal(own.folders.journal, log.parse, log.continues)
    position = journal.end()
    granted = permit.grant(own.folders.permits, number, seconds=60)
    try:
        with smtplib.SMTP(own.address, own.port, local_hostname=granted.name, timeout=60) as client:
            client.sendmail(f"b+{token}@bounces.example.test", [recipient], b"Subject: x\r\n\r\nHello.\r\n")
    except smtplib.SMTPException:
        pass
    finally:
        granted.release()
    outcome = journal.evidence(position, number).outcomes[token]
    return str(outcome.kind), outcome.enhanced, outcome.text


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
