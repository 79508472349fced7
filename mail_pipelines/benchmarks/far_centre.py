"""Sending from a server that is far from the centre: how much slower than beside it, with everything else the same."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy.engine import make_url

from mail_pipelines.benchmarks import distance, postfix
from mail_pipelines.benchmarks.contract import Result, judge
from mail_pipelines.benchmarks.dispatching import Dispatching, dispatching

ROUND_TRIP_SECONDS = 0.08
LOSS = 0.01
CONNECTIONS = 16
TARGET = 0.8


def run(quick: bool) -> list[Result]:
    """The rate of send runs whose database is far away, against that of runs in turn with them whose database is on the same host."""
    turns, seconds = (1, 8.0) if quick else (4, 20.0)
    with dispatching(int(2 * (turns + 1) * seconds * 2000)) as world, postfix.sink() as (port, sink):
        url = make_url(world.settings.database.url)
        assert url.port is not None
        with distance.path(url.port, ROUND_TRIP_SECONDS, LOSS) as far_port:
            far_url = url.set(port=far_port).render_as_string(hide_password=False)
            far_world: Dispatching = replace(world, environ={**world.environ, "MAIL_PIPELINES_DATABASE__URL": far_url})
            to = ("127.0.0.1", port)
            with world.server("near", to, (sink,)) as near, far_world.server("far", to, (sink,)) as far:
                for server in (near, far):
                    server.limit(CONNECTIONS)
                rates = [(near.send(seconds).rate, far.send(seconds).rate) for _ in range(turns)]
    name = f"through Exim, {ROUND_TRIP_SECONDS * 1000:.0f} ms and {LOSS:.0%} loss between server and database"
    return [judge(name, max(far for _, far in rates), "messages/s", max(near for near, _ in rates), target=TARGET, better="higher")]
