"""Why a server that was made here was given back: it is known after the server is gone."""

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("provisions", sa.Column("left_why", sa.String(500), nullable=True))


def downgrade() -> None:
    op.drop_column("provisions", "left_why")
