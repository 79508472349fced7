"""Holds of every scope in one table, asked by the claim, so its procedure is made anew. The reasons that campaigns had move there."""

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database.procedures import installation
from mail_pipelines.database.types import UtcDateTime, ascii_string

MYSQL = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mariadb_engine": "InnoDB", "mariadb_charset": "utf8mb4"}
_OVER = ("finished", "cancelled")

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_campaigns = sa.table(
    "campaigns",
    sa.column("id", sa.Integer),
    sa.column("state", ascii_string(16)),
    sa.column("held_reason", sa.String(500)),
    sa.column("updated_at", UtcDateTime()),
)


def upgrade() -> None:
    holds = op.create_table(
        "holds",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("scope_kind", ascii_string(10), nullable=False),
        sa.Column("scope_id", sa.Integer(), nullable=False),
        sa.Column("provider", ascii_string(32), nullable=False),
        sa.Column("reason", sa.String(500), nullable=False),
        sa.Column("by_whom", sa.String(100), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("released_at", UtcDateTime(), nullable=True),
        sa.Column("released_by", sa.String(100), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_holds")),
        **MYSQL,
    )
    op.create_index(op.f("ix_holds_released_at"), "holds", ["released_at"])
    # A campaign that is over is held no more. Who held the others, and when exactly, nobody recorded.
    over = _campaigns.c.state.in_(_OVER)
    found = sa.select(
        sa.literal("campaign"),
        _campaigns.c.id,
        sa.literal(""),
        _campaigns.c.held_reason,
        sa.literal("not recorded"),
        _campaigns.c.updated_at,
        sa.case((over, _campaigns.c.updated_at)),
        sa.case((over, sa.literal("not recorded"))),
    ).where(_campaigns.c.held_reason != "")
    columns = ["scope_kind", "scope_id", "provider", "reason", "by_whom", "created_at", "released_at", "released_by"]
    op.execute(sa.insert(holds).from_select(columns, found))
    op.drop_column("campaigns", "held_reason")
    installation.install(op.get_bind(), "claim_rows")


def downgrade() -> None:
    op.add_column("campaigns", sa.Column("held_reason", sa.String(length=500), nullable=True))
    op.execute(
        "UPDATE campaigns SET held_reason = (SELECT MIN(reason) FROM holds WHERE scope_kind = 'campaign' AND scope_id = campaigns.id AND released_at IS NULL)"
    )
    op.drop_table("holds")
