"""A claim begins where the last one of its connection ended."""

from alembic import op

from mail_pipelines.database.procedures import installation

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    installation.install(op.get_bind(), "claim_rows")


def downgrade() -> None:
    """The procedure stays: it needs nothing that the schema before did not have."""
