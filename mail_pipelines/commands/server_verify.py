"""`server verify` and `server check-egress`: whether a server can send."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mail_pipelines.commands.context import console, open_engine, settings

if TYPE_CHECKING:
    from mail_pipelines.provisioning.finding import Finding

AsJson = Annotated[bool, typer.Option("--json", help="print the findings as JSON")]
Domains = Annotated[list[str] | None, typer.Option("--egress-domain", help="try port 25 at the mail exchangers of this domain, may be repeated")]
Port = Annotated[int, typer.Option("--egress-port", hidden=True)]


def verify(
    name: str,
    as_json: AsJson = False,
    egress_domain: Domains = None,
    egress_port: Port = 25,
    wait: Annotated[float, typer.Option(help="longest wait for the test message to arrive (s)")] = 60,
) -> None:
    """Check whether server NAME can send: on its host the mail server and the way out, at the centre DNS, block lists and a test message that arrives.

    Exit status 1 if a check fails. It may be repeated, also while the server sends; it mails one message, to this installation's own return path.
    """
    from mail_pipelines.provisioning import verify

    domains = tuple(egress_domain) if egress_domain else None
    verdict = verify.verify(open_engine(), settings(), name, dt.datetime.now(dt.UTC), arrival_seconds=wait, egress_port=egress_port, egress_domains=domains)
    _tell(verdict.findings, as_json, verdict.elsewhere)
    if not verdict.ok:
        raise typer.Exit(1)


def check_egress(
    source: Annotated[str, typer.Option(help="address to connect from [default: server.address]")] = "",
    as_json: AsJson = False,
    egress_domain: Domains = None,
    egress_port: Port = 25,
) -> None:
    """Check whether this host reaches port 25 of real mail exchangers. Needs no database: for a host that is no server yet."""
    import socket

    from mail_pipelines.provisioning import host_checks

    own = settings().server
    found = host_checks.egress(settings().dns, own.hostname or socket.getfqdn(), source or own.address, egress_domain, egress_port)
    _tell([found], as_json)
    if found.ok is False:
        raise typer.Exit(1)


def _tell(findings: Sequence[Finding], as_json: bool, elsewhere: str = "") -> None:
    if as_json:
        typer.echo(json.dumps([{"name": finding.name, "ok": finding.ok, "text": finding.text} for finding in findings], ensure_ascii=False))
        return
    colours = {"ok": "green", "failed": "red", "unknown": "yellow"}
    for finding in findings:
        console.print(f"[{colours[finding.word]}]{finding.word:8}[/]", end="")
        console.print(f"{finding.name}: {finding.text}", markup=False, highlight=False)
    if elsewhere:
        console.print(elsewhere, markup=False, highlight=False)
