"""Servers that are made here, proposals to make some, and host sources that are set aside."""

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database.types import TinyInt, UtcDateTime, ascii_string

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

_MYSQL = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mariadb_engine": "InnoDB", "mariadb_charset": "utf8mb4"}


def upgrade() -> None:
    op.create_table(
        "provisions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("key", ascii_string(64), nullable=False),
        sa.Column("state", ascii_string(16), nullable=False),
        sa.Column("step", ascii_string(16), nullable=False),
        sa.Column("begun_at", UtcDateTime(), nullable=True),
        sa.Column("attempt", TinyInt, nullable=False),
        sa.Column("reason", sa.String(1000), nullable=True),
        sa.Column("state_at", UtcDateTime(), nullable=False),
        sa.Column("due_at", UtcDateTime(), nullable=True),
        sa.Column("why", sa.String(500), nullable=False),
        sa.Column("proposal_id", sa.Integer, nullable=True),
        sa.Column("pool", ascii_string(64), nullable=True),
        sa.Column("source", ascii_string(64), nullable=True),
        sa.Column("host_id", sa.String(200), nullable=True),
        sa.Column("server_id", sa.Integer, nullable=True),
        sa.Column("host", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("records", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("cost_per_hour", sa.Double, nullable=True),
        sa.Column("requested_at", UtcDateTime(), nullable=False),
        sa.Column("ordered_at", UtcDateTime(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=True),
        sa.Column("ended_at", UtcDateTime(), nullable=True),
        sa.UniqueConstraint("key", name=op.f("uq_provisions_key")),
        **_MYSQL,
    )
    op.create_index(op.f("ix_provisions_ended_at"), "provisions", ["ended_at"])
    op.create_table(
        "provision_proposals",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("state", ascii_string(16), nullable=False),
        sa.Column("servers", sa.Integer, nullable=False),
        sa.Column("pool", ascii_string(64), nullable=True),
        sa.Column("why", sa.String(500), nullable=False),
        sa.Column("effect", sa.String(500), nullable=False),
        sa.Column("cost_per_month", sa.Double, nullable=False),
        sa.Column("made_at", UtcDateTime(), nullable=False),
        sa.Column("decided_at", UtcDateTime(), nullable=True),
        **_MYSQL,
    )
    op.create_table(
        "sources_set_aside",
        sa.Column("name", ascii_string(64), primary_key=True),
        sa.Column("reason", sa.String(1000), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        **_MYSQL,
    )


def downgrade() -> None:
    op.drop_table("sources_set_aside")
    op.drop_table("provision_proposals")
    op.drop_table("provisions")
