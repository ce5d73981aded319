"""Jobs that fit EK-FAC factors: nothing of the schema changes, but older code does not know their kind.

Revision ID: 0008
Revises: 0007
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision: kinds are stored by their names."""


def downgrade() -> None:
    """Undo this revision; the older code knows nothing of the new kind, so its jobs go."""
    op.execute("DELETE FROM tasks WHERE job_id IN (SELECT id FROM jobs WHERE kind = 'fit_ekfac')")
    op.execute("DELETE FROM jobs WHERE kind = 'fit_ekfac'")
