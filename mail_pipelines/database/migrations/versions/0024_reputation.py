"""What mailbox providers tell of our domains and addresses, and the breakers of domains that follow from it."""

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database.types import UtcDateTime, ascii_string

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

_MYSQL = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mariadb_engine": "InnoDB", "mariadb_charset": "utf8mb4"}


def upgrade() -> None:
    op.create_table(
        "reputation",
        sa.Column("source", ascii_string(32), nullable=False),
        sa.Column("subject", ascii_string(253), nullable=False),
        sa.Column("day", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("spam_rate", sa.Double(), nullable=True),
        sa.Column("delivery_errors", sa.Double(), nullable=True),
        sa.Column("messages", sa.BigInteger(), nullable=True),
        sa.Column("filter_result", ascii_string(8), nullable=True),
        sa.Column("trap_hits", sa.Integer(), nullable=True),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("changed_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("source", "subject", "day", name=op.f("pk_reputation")),
        **_MYSQL,
    )
    op.create_index(op.f("ix_reputation_day"), "reputation", ["day"])
    op.create_table(
        "domain_breakers",
        sa.Column("domain", ascii_string(253), nullable=False),
        sa.Column("provider", ascii_string(32), nullable=False),
        sa.Column("state", ascii_string(8), nullable=False),
        sa.Column("reason", sa.String(200), nullable=False),
        sa.Column("trips", sa.Integer(), nullable=False),
        sa.Column("until", UtcDateTime(), nullable=True),
        sa.Column("changed_at", UtcDateTime(), nullable=False),
        sa.Column("day", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("domain", "provider", name=op.f("pk_domain_breakers")),
        **_MYSQL,
    )


def downgrade() -> None:
    op.drop_table("domain_breakers")
    op.drop_table("reputation")
