"""One send session as a process of its own, with no Dagster around it: what a benchmark starts, stops and kills.

Arguments: server, campaign, shard, run.
"""

from __future__ import annotations

import sys

from mail_pipelines import config
from mail_pipelines.database.engine import open_engine, reading
from mail_pipelines.dispatch import sending, servers


def main(server: str, campaign: str, shard: int, run: str) -> None:
    settings = config.load()
    engine = open_engine(settings.database)
    with reading(engine) as connection:
        info = servers.find(connection, server)
    planned = sending.plan(engine, campaign, shard)
    if planned.may_send:
        sending.run(engine, settings, info, planned, shard, run, lambda _: None)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
