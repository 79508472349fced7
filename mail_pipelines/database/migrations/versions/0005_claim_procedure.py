"""The stored procedure that claims rows of the ledger on MySQL/MariaDB."""

from alembic import op

from mail_pipelines.database.procedures import installation

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    installation.install(op.get_bind(), "claim_rows")


def downgrade() -> None:
    installation.remove(op.get_bind(), "claim_rows")
