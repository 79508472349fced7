"""Sending domains and their DKIM keys."""

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database.types import Blob, UtcDateTime, ascii_string

MYSQL = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mariadb_engine": "InnoDB", "mariadb_charset": "utf8mb4"}

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "sending_domains",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("domain", ascii_string(253), nullable=False),
        sa.Column("return_path_domain", ascii_string(253), nullable=False),
        sa.Column("tracking_domain", ascii_string(253), nullable=False),
        sa.Column("ready", sa.Boolean(), nullable=False),
        sa.Column("findings", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("checked_at", UtcDateTime(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sending_domains")),
        sa.UniqueConstraint("domain", name=op.f("uq_sending_domains_domain")),
        **MYSQL,
    )
    op.create_table(
        "dkim_keys",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("domain_id", sa.Integer(), nullable=False),
        sa.Column("selector", ascii_string(63), nullable=False),
        sa.Column("server_id", sa.Integer(), nullable=False),
        sa.Column("state", ascii_string(16), nullable=False),
        sa.Column("public_key", ascii_string(1024), nullable=False),
        sa.Column("private_key", Blob, nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("retired_at", UtcDateTime(), nullable=True),
        sa.ForeignKeyConstraint(["domain_id"], ["sending_domains.id"], name=op.f("fk_dkim_keys_domain_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dkim_keys")),
        sa.UniqueConstraint("domain_id", "selector", name=op.f("uq_dkim_keys_domain_id_selector")),
        **MYSQL,
    )


def downgrade() -> None:
    op.drop_table("dkim_keys")
    op.drop_table("sending_domains")
