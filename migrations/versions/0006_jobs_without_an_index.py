"""Jobs that work on a model, that only read an index, and that register the model that they make.

Revision ID: 0006
Revises: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

ACTIVE = sa.text("state IN ('queued', 'running')")
WRITING = sa.text("state IN ('queued', 'running') AND kind IN ('build_index', 'append_samples', 'repair_index')")


def upgrade() -> None:
    """Apply this revision."""
    op.drop_index("uq_jobs_index_id_active", "jobs")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("model_id", sa.String(length=40), nullable=True))
        batch_op.add_column(sa.Column("makes_model", sa.String(length=100), nullable=True))
        batch_op.create_foreign_key(
            batch_op.f("fk_jobs_model_id_models"), "models", ["model_id"], ["id"], ondelete="SET NULL"
        )
        batch_op.create_index(batch_op.f("ix_jobs_model_id"), ["model_id"], unique=False)
    _unique("index_id", WRITING)
    _unique("makes_model", ACTIVE)


def downgrade() -> None:
    """Undo this revision; the older code knows nothing of the new kinds, so their jobs go."""
    op.execute("DELETE FROM tasks WHERE job_id IN (SELECT id FROM jobs WHERE kind IN ('unlearn', 'valuation'))")
    op.execute("DELETE FROM jobs WHERE kind IN ('unlearn', 'valuation')")
    op.drop_index("uq_jobs_makes_model_active", "jobs")
    op.drop_index("uq_jobs_index_id_active", "jobs")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_jobs_model_id"))
        batch_op.drop_constraint(batch_op.f("fk_jobs_model_id_models"), type_="foreignkey")
        batch_op.drop_column("makes_model")
        batch_op.drop_column("model_id")
    _unique("index_id", ACTIVE)


def _unique(column: str, where: sa.TextClause) -> None:
    """At most one job of those that `where` holds for has this value."""
    op.create_index(
        f"uq_jobs_{column}_active", "jobs", [column], unique=True, sqlite_where=where, postgresql_where=where
    )
