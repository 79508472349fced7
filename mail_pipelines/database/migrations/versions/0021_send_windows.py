"""Send windows: a campaign's, when it is open in each time zone, and how many rows wait for it. Claims put off whom they may not be offered to now."""

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database.procedures import installation
from mail_pipelines.database.types import ascii_string

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

_MYSQL = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mariadb_engine": "InnoDB", "mariadb_charset": "utf8mb4"}


def upgrade() -> None:
    op.add_column("campaigns", sa.Column("send_window", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("campaigns", sa.Column("windows_kept", sa.BigInteger(), nullable=True))
    op.create_table(
        "window_spans",
        sa.Column("campaign_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("time_zone", ascii_string(48), nullable=False),
        sa.Column("opens_at", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("closes_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("campaign_id", "time_zone", "opens_at", name=op.f("pk_window_spans")),
        **_MYSQL,
    )
    op.create_table(
        "window_rows",
        sa.Column("campaign_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("provider", ascii_string(32), nullable=False),
        sa.Column("time_zone", ascii_string(48), nullable=False),
        sa.Column("opens_at", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("campaign_id", "provider", "time_zone", "opens_at", name=op.f("pk_window_rows")),
        **_MYSQL,
    )
    installation.install(op.get_bind(), "claim_rows")


def downgrade() -> None:
    """The version before makes its own procedure again: this one's needs the tables."""
    installation.remove(op.get_bind(), "claim_rows")
    op.drop_table("window_rows")
    op.drop_table("window_spans")
    op.drop_column("campaigns", "windows_kept")
    op.drop_column("campaigns", "send_window")
