"""The capacity plan: when campaigns will be out, what holds them up, and what more servers would change."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from mail_pipelines.commands.context import console, open_engine, settings

app = typer.Typer(no_args_is_help=True, help=__doc__)
Json = Annotated[bool, typer.Option("--json", help="print JSON instead")]


@app.command("show")
def show(as_json: Json = False) -> None:
    """The plan in force, as it was made last. Times are UTC."""
    import json

    from rich.table import Table

    from mail_pipelines.capacity import far, in_force
    from mail_pipelines.capacity.reports import minute
    from mail_pipelines.database.engine import reading

    with reading(open_engine()) as connection:
        kept = in_force.read(connection)
    if as_json:
        typer.echo(json.dumps(None if kept is None else {"epoch": kept.epoch, **kept.document}))
        return
    if kept is None:
        console.print("there is no plan yet: one is made within five minutes once a campaign is sending or scheduled")
        return
    plan = kept.document
    console.print(f"plan {kept.epoch} of {minute(plan['made_at'])}, until {minute(plan['until'])}, made in {plan['seconds']:.1f} s")
    if plan["by_rule"]:
        console.print(f"for {plan['by_rule']} providers by the simple rule: {escape('; '.join(plan['failures']))}", style="yellow")
    table = Table("campaign", "priority", "messages", "finishes", "finish by", "late", "held up by")
    for found in plan["campaigns"]:
        table.add_row(*_cells(found))
    console.print(table)
    for order in plan["orders"]:
        console.print(f"{order['campaign']}: {order['servers']} more warm servers would save its deadline ({escape(order['why'])})")
    saved = {order["campaign"] for order in plan["orders"]}
    for found in plan["campaigns"]:
        if found["late"] and found["campaign"] not in saved:
            console.print(escape(f"{found['campaign']}: no number of servers would save its deadline ({found['bottleneck']})"))
    for order in plan["far"]:
        when = "now" if order["due"] else f"by {order['order_by']}"
        what = f"pool {order['pool']}: order {order['servers']} servers {when}, to send from {order['first_day']} on"
        console.print(escape(f"{what}: {far.effect(order['short'], order['left'])} ({order['why']})"))
    for one in plan.get("idle", ()):
        then = "is kept" if one["keep"] else "is to be given back" if one["due"] else f"could be given back, since {one['since']}"
        console.print(escape(f"server {one['server']} {then}: {one['why']}"))


def _cells(found: dict[str, Any]) -> list[str]:
    from mail_pipelines.capacity.reports import ending, minute

    messages = f"{found['messages']:,}{' expected' if found['expected'] else ''}"
    texts = [found["campaign"], str(found["priority"]), messages, ending(found), minute(found["finish_by"]), f"{found['late']:,}", found["bottleneck"]]
    return [escape(text) for text in texts]


@app.command("what-if")
def what_if(
    servers: Annotated[int, typer.Option(min=0, help="warm servers more in each campaign's pool, as +3")] = 0,
    finish_by: Annotated[
        str | None, typer.Option(help="also say how many it takes to finish by then: a time with its zone, as in 2026-03-02T15:00:00+01:00")
    ] = None,
    campaign: Annotated[str | None, typer.Option(help="only this one")] = None,
    as_json: Json = False,
) -> None:
    """When campaigns would be out with more servers, and how many a deadline takes. Nothing is changed. Times are UTC."""
    import json
    from dataclasses import asdict

    from mail_pipelines.campaigns.yaml_form import parse_time
    from mail_pipelines.capacity import planning, sizes
    from mail_pipelines.capacity import what_if as questions
    from mail_pipelines.database.engine import reading
    from mail_pipelines.resources import provisioning

    deadline = None if finish_by is None else parse_time(finish_by, "--finish-by")
    engine = open_engine()
    sources = provisioning.host_sources(engine, settings())
    unknown = sizes.count(engine, settings())
    with reading(engine) as connection:
        situation = planning.read(connection, settings(), sources=sources)
    answers = questions.ask(situation, servers, deadline, campaign)
    if as_json:
        typer.echo(json.dumps([asdict(answer) for answer in answers]))
        return
    if not answers:
        console.print("nothing is sent or scheduled within 48 hours")
    for problem in unknown:
        console.print(f"the size of a scheduled campaign is not known: {problem}", style="yellow", markup=False)
    for answer in answers:
        console.print(escape(f"{answer.campaign}: {questions.sentence(answer)}"))
