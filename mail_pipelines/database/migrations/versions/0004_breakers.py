"""Breakers: servers that a provider refuses."""

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database.types import UtcDateTime, ascii_string

MYSQL = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mariadb_engine": "InnoDB", "mariadb_charset": "utf8mb4"}

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "breakers",
        sa.Column("server_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("provider", ascii_string(32), nullable=False),
        sa.Column("state", ascii_string(8), nullable=False),
        sa.Column("rule", ascii_string(24), nullable=False),
        sa.Column("reason", sa.String(200), nullable=False),
        sa.Column("trips", sa.Integer(), nullable=False),
        sa.Column("until", UtcDateTime(), nullable=True),
        sa.Column("changed_at", UtcDateTime(), nullable=False),
        sa.Column("baseline", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("server_id", "provider", name=op.f("pk_breakers")),
        **MYSQL,
    )


def downgrade() -> None:
    op.drop_table("breakers")
