"""Without the index of revision 0004, whose gain did not repeat."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Drop the index."""
    op.drop_index(op.f("ix_run_summary_listed"), "run_summary")
