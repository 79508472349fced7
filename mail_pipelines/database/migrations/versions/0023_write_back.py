"""External sources: what is still to be told to them, and what they refused. And a greylisted row that is given back unoffered goes on waiting for its server:
the procedure that gives rows back is made anew.
"""

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database.procedures import installation
from mail_pipelines.database.types import TinyInt, UtcDateTime, ascii_string

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

_MYSQL = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mariadb_engine": "InnoDB", "mariadb_charset": "utf8mb4"}


def upgrade() -> None:
    op.create_table(
        "sync_outbox",
        sa.Column("source", ascii_string(32), nullable=False),
        sa.Column("kind", ascii_string(16), nullable=False),
        sa.Column("event_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("contact_id", sa.BigInteger(), nullable=False),
        sa.Column("occurred_at", UtcDateTime(), nullable=False),
        sa.Column("recorded_at", UtcDateTime(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("state", TinyInt, nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("source", "kind", "event_id", name=op.f("pk_sync_outbox")),
        **_MYSQL,
    )
    op.create_index(op.f("ix_sync_outbox_source_state_due_at"), "sync_outbox", ["source", "state", "due_at"])
    op.create_index(op.f("ix_sync_outbox_contact_id"), "sync_outbox", ["contact_id"])
    op.create_table(
        "sync_dead_letters",
        sa.Column("source", ascii_string(32), nullable=False),
        sa.Column("kind", ascii_string(16), nullable=False),
        sa.Column("event_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("contact_id", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.String(500), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("source", "kind", "event_id", name=op.f("pk_sync_dead_letters")),
        **_MYSQL,
    )
    op.create_index(op.f("ix_sync_dead_letters_contact_id"), "sync_dead_letters", ["contact_id"])
    installation.install(op.get_bind(), "release_rows")


def downgrade() -> None:
    op.drop_table("sync_dead_letters")
    op.drop_table("sync_outbox")
