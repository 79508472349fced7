"""Warm-up of servers: the cap of a day for each provider, which claims keep, its history, and the state `warming`, in which a server sends."""

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database.procedures import installation
from mail_pipelines.database.types import ascii_string

MYSQL = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mariadb_engine": "InnoDB", "mariadb_charset": "utf8mb4"}

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "warm_ups",
        sa.Column("server_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("provider", ascii_string(32), nullable=False),
        sa.Column("curve", ascii_string(32), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("per_day", sa.Integer(), nullable=True),
        sa.Column("judged", sa.BigInteger(), nullable=False),
        sa.Column("last_used", sa.BigInteger(), nullable=True),
        sa.Column("reason", sa.String(200), nullable=False),
        sa.PrimaryKeyConstraint("server_id", "provider", name=op.f("pk_warm_ups")),
        **MYSQL,
    )
    op.create_table(
        "warm_up_days",
        sa.Column("server_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("provider", ascii_string(32), nullable=False),
        sa.Column("day", sa.BigInteger(), autoincrement=False, nullable=False),
        *(sa.Column(name, sa.Integer(), nullable=name == "per_day") for name in ("step", "per_day", "sent", "delivered", "bounced", "deferred", "complaints")),
        sa.Column("verdict", ascii_string(8), nullable=False),
        sa.Column("why", sa.String(200), nullable=False),
        sa.PrimaryKeyConstraint("server_id", "provider", "day", name=op.f("pk_warm_up_days")),
        **MYSQL,
    )
    _view("SELECT id FROM servers WHERE state IN ('active', 'warming')")
    installation.install(op.get_bind(), "claim_rows")


def downgrade() -> None:
    """The version before makes its own procedure again: this one's needs the tables."""
    installation.remove(op.get_bind(), "claim_rows")
    _view("SELECT id FROM servers WHERE state = 'active'")
    op.execute("UPDATE servers SET state = 'active' WHERE state = 'warming'")
    op.drop_table("warm_up_days")
    op.drop_table("warm_ups")


def _view(query: str) -> None:
    # Claims of workers that are at it must find it at any time; SQLite has all of this in one transaction.
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP VIEW active_servers")
        op.execute(f"CREATE VIEW active_servers AS {query}")
    else:
        op.execute(f"CREATE OR REPLACE VIEW active_servers AS {query}")
