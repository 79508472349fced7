"""What the plan in force gives a campaign of a grant, and which plan that was. Versions before leave both alone."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("allotments", sa.Column("planned", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("allotments", sa.Column("plan_epoch", sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("allotments", "plan_epoch")
    op.drop_column("allotments", "planned")
