"""Where the ledger of an archived campaign is, and since when it is no longer here."""

import sqlalchemy as sa
from alembic import op

from mail_pipelines.database.types import UtcDateTime

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("campaigns", sa.Column("archive", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("campaigns", sa.Column("archived_at", UtcDateTime(), nullable=True))


def downgrade() -> None:
    op.drop_column("campaigns", "archived_at")
    op.drop_column("campaigns", "archive")
