"""Database accounts of dispatch servers, the views and procedures they need, and a claim that ends the rows that may not be mailed itself."""

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database.procedures import installation
from mail_pipelines.database.types import ascii_string

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

_PROCEDURES = ("claim_rows", "release_rows", "suppress_bounced", "recipient_wanted")
_VIEWS = {
    "deferred_rows": "SELECT campaign_id, shard, provider, sort_key, reason, server_id FROM deliveries WHERE state = 3",
    "shard_counts": "SELECT campaign_id, shard, provider, state, count FROM campaign_counters",
    "active_servers": "SELECT id FROM servers WHERE state = 'active'",
    "ledger_rows": "SELECT campaign_id, contact_id, provider, state, attempt FROM deliveries",
}


def upgrade() -> None:
    op.add_column("servers", sa.Column("account", ascii_string(32), nullable=True))
    op.create_index("ix_servers_account", "servers", ["account"], unique=True)
    for name, query in _VIEWS.items():
        op.execute(f"CREATE VIEW {name} AS {query}")
    for name in _PROCEDURES:
        installation.install(op.get_bind(), name)


def downgrade() -> None:
    for name in _PROCEDURES[1:]:
        installation.remove(op.get_bind(), name)
    for name in _VIEWS:
        op.execute(f"DROP VIEW {name}")
    op.drop_index("ix_servers_account", "servers")
    op.drop_column("servers", "account")
