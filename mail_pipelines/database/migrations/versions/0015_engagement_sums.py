"""What is kept of engagement events past their time: a sum for each recipient, and one for each hour of a campaign."""

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database.types import UtcDateTime, ascii_string

MYSQL = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mariadb_engine": "InnoDB", "mariadb_charset": "utf8mb4"}

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "engagement_sums",
        sa.Column("campaign_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("kind", ascii_string(16), nullable=False),
        sa.Column("contact_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("link_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("machine", sa.Boolean(), autoincrement=False, nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("first_at", UtcDateTime(), nullable=False),
        sa.Column("last_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("campaign_id", "kind", "contact_id", "link_id", "machine", name=op.f("pk_engagement_sums")),
        **MYSQL,
    )
    op.create_index(op.f("ix_engagement_sums_contact_id"), "engagement_sums", ["contact_id"])
    op.create_table(
        "engagement_hours",
        sa.Column("campaign_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("hour", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("kind", ascii_string(16), nullable=False),
        sa.Column("machine", sa.Boolean(), autoincrement=False, nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("campaign_id", "hour", "kind", "machine", name=op.f("pk_engagement_hours")),
        **MYSQL,
    )


def downgrade() -> None:
    """What was rolled up is forgotten: its single events are gone."""
    op.drop_table("engagement_hours")
    op.drop_table("engagement_sums")
