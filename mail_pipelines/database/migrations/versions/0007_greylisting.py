"""A greylisted row waits for the server that was greylisted: the claim leaves it out elsewhere, so its procedure is made anew."""

from alembic import op

from mail_pipelines.database.procedures import installation

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    installation.install(op.get_bind(), "claim_rows")


def downgrade() -> None:
    """The procedure stays: it needs nothing that the schema before did not have."""
