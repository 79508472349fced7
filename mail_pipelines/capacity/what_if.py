"""What more servers would change, answered before anything is sent: the same planning with lines that are not there."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass

from mail_pipelines.capacity import forecast
from mail_pipelines.capacity.demand import Job
from mail_pipelines.capacity.near import NearPlan
from mail_pipelines.capacity.planning import Situation
from mail_pipelines.capacity.reports import minute
from mail_pipelines.errors import MailPipelinesError


class UnknownCampaign(MailPipelinesError):
    """There is no plan for this campaign."""


@dataclass(frozen=True)
class Answer:
    """One campaign with the servers there are, and with `servers` more warm ones in its pool. Times are ISO 8601; None: not within 48 hours.

    `needed` is how many warm servers it takes to end by `finish_by`: 0 if it does anyway, None if no number does or no time was named.
    `new_servers_from` is the first day on which servers ordered now send; they help if the campaign is not over by then.
    """

    campaign: str
    finish_at: str | None
    bottleneck: str
    servers: int
    finish_with: str | None
    finish_by: str | None
    needed: int | None
    new_servers_from: str
    new_servers_help: bool


def ask(situation: Situation, servers: int, finish_by: dt.datetime | None = None, campaign: str | None = None) -> list[Answer]:
    """The answers for all planned campaigns, or for one. Without `finish_by` each campaign's own counts.

    Raises `UnknownCampaign`.
    """
    jobs = [job for job in situation.jobs if campaign in (None, job.key)]
    if campaign is not None and not jobs:
        known = ", ".join(job.key for job in situation.jobs) or "none"
        raise UnknownCampaign(f"campaign {campaign} has nothing to send within 48 hours; those that have: {known}")
    return list(_answers(situation, jobs, servers, finish_by))


def _answers(situation: Situation, jobs: list[Job], servers: int, finish_by: dt.datetime | None) -> Iterator[Answer]:
    now = situation.plan()
    found = {one.campaign: one for one in forecast.forecasts(now)}
    new_servers_at = situation.new_servers_at()
    with_more: dict[tuple[int, int], NearPlan] = {}

    def planned(job: Job, count: int) -> NearPlan:
        if (job.pool_id, count) not in with_more:
            providers = sorted({demand.provider for demand in situation.demands})
            with_more[job.pool_id, count] = situation.plan(situation.more_servers(count, [job.pool_id], providers))
        return with_more[job.pool_id, count]

    for job in jobs:
        deadline = job.finish_by if finish_by is None else int(finish_by.timestamp())

        def saves(count: int, job: Job = job, deadline: int | None = deadline) -> bool:
            ended = planned(job, count).finish(job.id)
            return ended is not None and deadline is not None and ended <= deadline

        ended = now.finish(job.id) if job.sized else None
        over = ended if ended is not None else _moment(found[job.key].earliest)
        in_time = ended is not None and deadline is not None and ended <= deadline
        yield Answer(
            campaign=job.key,
            finish_at=_iso(ended),
            bottleneck=found[job.key].bottleneck,
            servers=servers,
            finish_with=_iso(planned(job, servers).finish(job.id)) if servers and job.sized else None,
            finish_by=_iso(deadline),
            needed=0 if in_time else forecast.least(saves) if deadline is not None and job.sized else None,
            new_servers_from=new_servers_at.date().isoformat(),
            new_servers_help=job.sized and (over is None or over > new_servers_at.timestamp()),
        )


def sentence(answer: Answer) -> str:
    """An answer for people: "finishes 17:40; with 3 more warm servers 15:00; new servers would help from 4 December". Times are UTC."""
    parts = [f"finishes {_when(answer.finish_at)} ({answer.bottleneck})" if answer.bottleneck else f"finishes {_when(answer.finish_at)}"]
    if answer.servers:
        parts.append(f"with {_servers(answer.servers)} {_when(answer.finish_with)}")
    if answer.finish_by is not None:
        by = f"to finish by {_when(answer.finish_by)}"
        if answer.needed is None:
            parts.append(f"{by} no number of servers is enough")
        else:
            parts.append(f"{by} it needs {_servers(answer.needed)}" if answer.needed else f"{by} no more servers are needed")
    day = dt.date.fromisoformat(answer.new_servers_from)
    help_from = f"new servers would {'help' if answer.new_servers_help else 'send'} from {day.day} {day:%B}"
    return "; ".join([*parts, help_from if answer.new_servers_help else f"{help_from}, when it is over"])


def _servers(count: int) -> str:
    return f"{count} more warm server{'s' if count > 1 else ''}"


def _when(moment: str | None) -> str:
    return "not within 48 hours" if moment is None else minute(moment)


def _moment(iso: str | None) -> float | None:
    return None if iso is None else dt.datetime.fromisoformat(iso).timestamp()


def _iso(moment: float | None) -> str | None:
    return None if moment is None else dt.datetime.fromtimestamp(round(moment), dt.UTC).isoformat()
