"""Live progress of campaigns by server, from the counters that pages and sensors read."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table
from sqlalchemy.engine import Engine

from mail_pipelines.campaigns import store
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.database.engine import reading
from mail_pipelines.delivery import statistics
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.supervision import Processes

_SHOW_SECONDS = 3.0
# Longer than the freeze of an audience of a million, and than any wait for a retry.
_STALL_SECONDS = 240.0


@dataclass(frozen=True)
class Standing:
    """How far one campaign is. `by_server`: recipients whose fate is decided."""

    key: str
    state: CampaignState
    audience: int
    waiting: int
    unknown: int
    by_server: Mapping[str, int]

    @property
    def done(self) -> int:
        return sum(self.by_server.values())

    @property
    def is_over(self) -> bool:
        return self.state is CampaignState.FINISHED or (self.state is CampaignState.SENDING and self.unknown > 0 and not self.waiting)


def standing(engine: Engine, key: str) -> Standing:
    """Raises `MailPipelinesError` if the campaign is held."""
    with reading(engine) as connection:
        campaign = store.load(connection, key)
        found = statistics.read(connection, campaign)
    if campaign.hold:
        raise MailPipelinesError(str(campaign.hold))
    decided = found.by_server.set_index("server")[["delivered", "bounced"]].sum(axis=1)
    by_server = {str(server): int(count) for server, count in decided.items()}
    totals = found.totals
    return Standing(key, campaign.state, totals.audience, totals.pending + totals.deferred, totals.unknown, by_server)


def until_over(engine: Engine, processes: Processes, console: Console, keys: Sequence[str], servers: Sequence[str]) -> None:
    """Show how far the campaigns are, on a terminal as a table, elsewhere as lines, until nothing of them is open but rows in doubt.

    Raises `MailPipelinesError` if nothing changes for long, and what the processes raise.
    """
    before: list[Standing] = []
    changed = shown = time.monotonic()
    done = 0
    with ExitStack() as stack:
        live = stack.enter_context(Live(console=console, auto_refresh=False, transient=True)) if console.is_terminal else None
        while True:
            now, standings = time.monotonic(), [standing(engine, key) for key in keys]
            if all(one.is_over for one in standings):
                return
            total = sum(one.done for one in standings)
            rate, done, shown = (total - done) / max(now - shown, 0.1), total, now
            if live is not None:
                live.update(_table(standings, servers, rate), refresh=True)
            else:
                console.print(_line(standings, servers, rate), markup=False, highlight=False)
            if standings != before:
                before, changed = standings, now
            elif now - changed > _STALL_SECONDS:
                raise MailPipelinesError(f"nothing has changed for {_STALL_SECONDS:.0f} s: {_line(standings, servers, rate)}")
            processes.wait(_SHOW_SECONDS)


def _line(standings: Sequence[Standing], servers: Sequence[str], rate: float) -> str:
    words = [f"{dt.datetime.now(dt.UTC):%H:%M:%S} {rate:,.0f}/s"]
    for one in standings:
        by_server = " ".join(f"{server} {one.by_server.get(server, 0):,}" for server in servers)
        words.append(f"{one.key} {one.state} {one.done:,} of {one.audience:,} ({by_server})")
    return " | ".join(words)


def _table(standings: Sequence[Standing], servers: Sequence[str], rate: float) -> Table:
    table = Table("campaign", "state", "recipients", *servers, "open", caption=f"{rate:,.0f} a second")
    for column in table.columns[2:]:
        column.justify = "right"
    for one in standings:
        counts = [one.audience, *(one.by_server.get(server, 0) for server in servers), one.waiting]
        table.add_row(one.key, str(one.state), *(f"{count:,}" for count in counts))
    return table
