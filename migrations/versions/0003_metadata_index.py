"""PostgreSQL finds rows by their metadata in an index; an index that no query used goes, which writing paid for.

Revision ID: 0003
Revises: 0002
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

NAME, UNUSED = "ix_samples_metadata", "ix_samples_row_id"


def upgrade() -> None:
    """Apply this revision."""
    op.drop_index(UNUSED, "samples")  # rows are looked up within a dataset, by the unique (dataset_id, row_id)
    if op.get_bind().dialect.name == "postgresql":
        op.create_index(
            NAME,
            "samples",
            ["metadata"],
            postgresql_using="gin",
            postgresql_ops={"metadata": "jsonb_path_ops"},  # smaller than the default, and all that @> needs
        )


def downgrade() -> None:
    """Undo this revision."""
    if op.get_bind().dialect.name == "postgresql":
        op.drop_index(NAME, "samples")
    op.create_index(UNUSED, "samples", ["row_id"])
