"""Pools that the claim looks at: every campaign and server has one, and a campaign may name another for what its own cannot send."""

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database.procedures import installation

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("campaigns", sa.Column("overflow_pool_id", sa.Integer(), nullable=True))
    # Until now a campaign without a pool was sent by all servers, which were all in the default pool.
    for table in ("campaigns", "servers"):
        row = sa.table(table, sa.column("pool_id", sa.Integer))
        op.execute(sa.update(row).where(row.c.pool_id.is_(None)).values(pool_id=1))
    installation.install(op.get_bind(), "claim_rows")


def downgrade() -> None:
    op.drop_column("campaigns", "overflow_pool_id")
