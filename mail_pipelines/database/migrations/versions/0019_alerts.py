"""Alerts: what operators were told of."""

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database.types import UtcDateTime, ascii_string

MYSQL = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mariadb_engine": "InnoDB", "mariadb_charset": "utf8mb4"}

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "alerts",
        sa.Column("key", ascii_string(190), nullable=False),
        sa.Column("text", sa.String(1000), nullable=False),
        sa.Column("command", sa.String(200), nullable=False),
        sa.Column("first_seen", UtcDateTime(), nullable=False),
        sa.Column("last_seen", UtcDateTime(), nullable=False),
        sa.Column("due_at", UtcDateTime(), nullable=False),
        sa.Column("sent", sa.JSON(), nullable=False),
        sa.Column("resolved_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_alerts")),
        **MYSQL,
    )


def downgrade() -> None:
    op.drop_table("alerts")
