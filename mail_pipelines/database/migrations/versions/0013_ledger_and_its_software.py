"""Which versions may work with this schema, and which database server the ledger is on; a claim asks for the last heartbeat that its server remembers."""

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database.procedures import installation
from mail_pipelines.database.types import ascii_string

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("ledger_generation", sa.Column("oldest_schema", ascii_string(8), nullable=False, server_default=""))
    op.add_column("ledger_generation", sa.Column("database_id", sa.BigInteger(), nullable=True))
    installation.install(op.get_bind(), "claim_rows")


def downgrade() -> None:
    op.drop_column("ledger_generation", "database_id")
    op.drop_column("ledger_generation", "oldest_schema")
