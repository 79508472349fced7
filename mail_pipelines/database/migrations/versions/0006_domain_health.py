"""Recipient domains that do not answer: the claim leaves their rows out, so its procedure is made anew."""

from alembic import op

from mail_pipelines.database.procedures import installation
from mail_pipelines.database.types import UtcDateTime

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Nothing has written the table before.
    with op.batch_alter_table("domain_health") as table:
        table.alter_column("dead_until", existing_type=UtcDateTime(), nullable=False)
    installation.install(op.get_bind(), "claim_rows")


def downgrade() -> None:
    with op.batch_alter_table("domain_health") as table:
        table.alter_column("dead_until", existing_type=UtcDateTime(), nullable=True)
