"""Recovery: what the servers' logs say that a restored database has forgotten."""

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database.types import TinyInt, UtcDateTime, ascii_string

MYSQL = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mariadb_engine": "InnoDB", "mariadb_charset": "utf8mb4"}

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "recoveries",
        sa.Column("generation", ascii_string(36), nullable=False),
        sa.Column("began_at", UtcDateTime(), nullable=False),
        sa.Column("finished_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("generation", name=op.f("pk_recoveries")),
        **MYSQL,
    )
    op.create_table(
        "recovery_servers",
        sa.Column("generation", ascii_string(36), nullable=False),
        sa.Column("server_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("part", ascii_string(12), nullable=False),
        sa.Column("heartbeat_at", UtcDateTime(), nullable=True),
        sa.Column("incarnation", ascii_string(36), nullable=True),
        sa.Column("boot_id", ascii_string(36), nullable=True),
        sa.Column("journal_inode", sa.BigInteger(), nullable=True),
        sa.Column("offers", sa.BigInteger(), nullable=False),
        sa.Column("note", sa.String(200), nullable=True),
        sa.PrimaryKeyConstraint("generation", "server_id", name=op.f("pk_recovery_servers")),
        **MYSQL,
    )
    op.create_table(
        "recovered_offers",
        sa.Column("campaign_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("contact_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("attempt", TinyInt, autoincrement=False, nullable=False),
        sa.Column("server_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("kind", ascii_string(12), nullable=False),
        sa.Column("at", sa.Integer(), nullable=False),
        sa.Column("code", sa.SmallInteger(), nullable=True),
        sa.Column("enhanced", ascii_string(11), nullable=True),
        sa.Column("text", sa.String(500), nullable=True),
        sa.PrimaryKeyConstraint("campaign_id", "contact_id", "attempt", "server_id", name=op.f("pk_recovered_offers")),
        **MYSQL,
    )


def downgrade() -> None:
    op.drop_table("recovered_offers")
    op.drop_table("recovery_servers")
    op.drop_table("recoveries")
