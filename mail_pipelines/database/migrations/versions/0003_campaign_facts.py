"""What recipients count for beside their state: late bounces, complaints, unsubscribing by mail."""

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database.types import ascii_string

MYSQL = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mariadb_engine": "InnoDB", "mariadb_charset": "utf8mb4"}

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "campaign_facts",
        sa.Column("campaign_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("provider", ascii_string(32), nullable=False),
        sa.Column("kind", ascii_string(16), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("campaign_id", "provider", "kind", name=op.f("pk_campaign_facts")),
        **MYSQL,
    )


def downgrade() -> None:
    op.drop_table("campaign_facts")
