"""Views of the central database: what a dispatch server may know of rows that are not its own, without saying whose they are.

They exist on SQLite as well, so that the same statement asks everywhere. The other views, which only the accounts of dispatch servers see, are in
`database.boundary`.
"""

from __future__ import annotations

import sqlalchemy as sa

from mail_pipelines.database.types import TinyInt, ascii_string

# Not in the metadata of the models: a view is made by its migration, and never emptied.
_VIEWS = sa.MetaData()

# Every server's rows of a shard that wait to be offered again.
deferred_rows = sa.Table(
    "deferred_rows",
    _VIEWS,
    sa.Column("campaign_id", sa.Integer),
    sa.Column("shard", TinyInt),
    sa.Column("provider", ascii_string(32)),
    sa.Column("sort_key", sa.Integer),
    sa.Column("reason", ascii_string(24)),
    sa.Column("server_id", sa.Integer),
)
# `campaign_counters` without the servers that count.
shard_counts = sa.Table(
    "shard_counts",
    _VIEWS,
    sa.Column("campaign_id", sa.Integer),
    sa.Column("shard", TinyInt),
    sa.Column("provider", ascii_string(32)),
    sa.Column("state", TinyInt),
    sa.Column("count", sa.Integer),
)
active_servers = sa.Table("active_servers", _VIEWS, sa.Column("id", sa.Integer))
# The ledger, to be compared with a log.
ledger_rows = sa.Table(
    "ledger_rows",
    _VIEWS,
    sa.Column("campaign_id", sa.Integer),
    sa.Column("contact_id", sa.BigInteger),
    sa.Column("provider", ascii_string(32)),
    sa.Column("state", TinyInt),
    sa.Column("attempt", TinyInt),
)

__all__ = ["active_servers", "deferred_rows", "ledger_rows", "shard_counts"]
