"""External sources: which record of a source became which contact, and which version of it is in."""

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database.types import Hash16, TinyInt, UtcDateTime, ascii_string, byte_string

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

_MYSQL = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mariadb_engine": "InnoDB", "mariadb_charset": "utf8mb4"}


def upgrade() -> None:
    op.create_table(
        "source_contacts",
        sa.Column("source", ascii_string(32), nullable=False),
        sa.Column("external_id", byte_string(190), nullable=False),
        sa.Column("contact_id", sa.BigInteger(), nullable=False),
        sa.Column("address_hash", Hash16, nullable=False),
        sa.Column("changed_at", UtcDateTime(), nullable=True),
        sa.Column("merged_at", UtcDateTime(), nullable=False),
        sa.Column("run", sa.Integer(), nullable=False),
        sa.Column("state", TinyInt, nullable=False),
        sa.PrimaryKeyConstraint("source", "external_id", name=op.f("pk_source_contacts")),
        **_MYSQL,
    )
    op.create_index(op.f("ix_source_contacts_contact_id"), "source_contacts", ["contact_id"])
    op.create_index(op.f("ix_source_contacts_source_state_run"), "source_contacts", ["source", "state", "run"])


def downgrade() -> None:
    op.drop_table("source_contacts")
