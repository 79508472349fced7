"""A claim waits for whoever changes its campaign before it asks anything else."""

from alembic import op

from mail_pipelines.database.procedures import installation

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    installation.install(op.get_bind(), "claim_rows")


def downgrade() -> None:
    """The procedure stays: it needs nothing that the schema before did not have."""
