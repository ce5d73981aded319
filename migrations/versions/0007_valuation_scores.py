"""Scores of valuations.

Revision ID: 0007
Revises: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.create_table(
        "valuation_scores",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("validation_group", sa.String(length=200), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("row_id", sa.String(length=16), nullable=False),
        sa.Column("value", sa.Float(precision=53), nullable=False),
        sa.Column("uncertainty", sa.Float(precision=53), nullable=True),
        sa.Column("labelled", sa.Boolean(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("price", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_valuation_scores_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "validation_group", "rank", name=op.f("pk_valuation_scores")),
    )


def downgrade() -> None:
    """Undo this revision; the files of a valuation keep its scores."""
    op.drop_table("valuation_scores")
