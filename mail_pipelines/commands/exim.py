"""Exim as a dispatch server."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command("run")
def run(
    name: Annotated[str, typer.Argument(help="with commas between them, several that share one Exim, as MAIL_PIPELINES_SERVER names them")],
    hostname: Annotated[
        str | None, typer.Option(help="name towards destinations, of several servers the first one's; has to match the reverse DNS; else server.hostname")
    ] = None,
    destination: Annotated[
        list[str] | None,
        typer.Option(help="ADDRESS:PORT that gets all mail in place of the recipients' mail exchangers, or DOMAIN=ADDRESS:PORT for one; for tests"),
    ] = None,
) -> None:
    """Run an own Exim as the registered server NAME until stopped. Nothing of the system's mail set-up is used or changed."""
    from mail_pipelines import config
    from mail_pipelines.imports import uncollected

    with uncollected():
        from mail_pipelines.dispatch.exim import process

    names, spoken_for = config.servers_of_this_host({config.SERVER_VARIABLE: name}), config.servers_of_this_host()
    if len(names) > 1 and names != spoken_for:
        raise config.ConfigError(
            f"runs of several servers execute in a worker that speaks for them: set {config.SERVER_VARIABLE}={','.join(names)} for all processes of this host "
            "(docs/production.md)"
        )
    members = {key: config.load_for(key) for key in names}
    if not spoken_for:
        # Then this host is the centre's, too, and its servers' processes do what else the centre would (judge the breakers).
        members = {key: own.model_copy(update={"this_server": None}) for key, own in members.items()}
    for_all = [given for given in destination or () if "=" not in given]
    by_domain = [given.split("=", 1) for given in destination or () if "=" in given]
    process.run(
        members,
        hostname=hostname,
        destinations=tuple(map(_address, for_all)),
        routes=tuple((domain, _address(address)) for domain, address in by_domain),
    )


def _address(text: str) -> tuple[str, int]:
    from mail_pipelines.errors import MailPipelinesError

    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdigit():
        raise MailPipelinesError(f"--destination is {text!r}; expected ADDRESS:PORT, such as 127.0.0.1:2525")
    return host, int(port)
