"""The job's settings are recorded, and what was changed of them between two starts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # Made anew, as in 0002: SQLite would want a default for the new column, and keep it.
    op.rename_table("job", "job_0002")
    op.create_table(
        "job",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("prepared", sa.Text, nullable=False),
        sa.Column("settings", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.execute(
        "INSERT INTO job (id, name, run_id, model, prepared, settings, created_at) "
        "SELECT id, name, run_id, model, prepared, '', created_at FROM job_0002"
    )
    op.drop_table("job_0002")
    op.create_table(
        "changes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("setting", sa.Text, nullable=False),
        sa.Column("before", sa.Text, nullable=False),
        sa.Column("now", sa.Text, nullable=False),
        sa.Column("accepted", sa.Boolean, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
    )
