"""One truth and months: unknown is NULL, rounds may be superseded, failures are counted by kind, intents are recorded.

Every table is made anew and filled from the one before it: SQLite cannot change columns in place.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    for table in ("job", "rounds", "devices", "tasks", "updates", "failures"):
        if table in ("tasks", "updates"):
            op.drop_index(f"ix_{table}_round", table)  # the new table's has the same name
        op.rename_table(table, f"{table}_0001")
    _create_tables()
    for statement in _COPIES:
        op.execute(statement)
    for table in ("job", "rounds", "devices", "tasks", "updates", "failures"):
        op.drop_table(f"{table}_0001")


_COPIES = (
    "INSERT INTO job (id, name, run_id, model, prepared, created_at) "
    "SELECT id, name, run_id, model, prepared, created_at FROM job_0001",
    "INSERT INTO rounds (round, digest, size_bytes, closed_at, devices, samples, accuracy, loss, export_path, "
    "parity_max_abs, published, note, aside_digest, epsilon, superseded, kept) "
    "SELECT round, digest, size_bytes, closed_at, devices, samples, NULLIF(accuracy, -1), NULLIF(loss, -1), "
    "export_path, NULLIF(parity_max_abs, -1), true, '', '', NULL, false, true FROM rounds_0001 ORDER BY round",
    "INSERT INTO devices (device_id, name, report, first_seen, last_seen) "
    "SELECT device_id, name, report, first_seen, last_seen FROM devices_0001",
    # Whether a task is accepted is said by its update.
    "INSERT INTO tasks (task_id, round, device_id, attempt, status, plan, sample_count, given_at) "
    "SELECT task_id, round, device_id, attempt, CASE status WHEN 'accepted' THEN 'given' ELSE status END, plan, "
    "sample_count, given_at FROM tasks_0001",
    "INSERT INTO updates (task_id, round, device_id, result, size_bytes, received_at, norm, buffer_norm) "
    "SELECT task_id, round, device_id, result, size_bytes, received_at, NULL, NULL FROM updates_0001",
    "INSERT INTO failures (status, reason, times, message, task_id, at) "
    "SELECT one.status, one.reason, kind.times, one.message, one.task_id, one.at FROM failures_0001 one "
    "JOIN (SELECT COUNT(*) AS times, MAX(id) AS last FROM failures_0001 GROUP BY status, reason) kind "
    "ON kind.last = one.id",
)


def _create_tables() -> None:
    op.create_table(
        "job",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("prepared", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.create_table(
        "rounds",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("digest", sa.Text, nullable=False, index=True),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("closed_at", sa.Double, nullable=False),
        sa.Column("devices", sa.Integer, nullable=False),
        sa.Column("samples", sa.BigInteger, nullable=False),
        sa.Column("accuracy", sa.Double),
        sa.Column("loss", sa.Double),
        sa.Column("export_path", sa.Text, nullable=False),
        sa.Column("parity_max_abs", sa.Double),
        sa.Column("published", sa.Boolean, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("aside_digest", sa.Text, nullable=False),
        sa.Column("epsilon", sa.Double),
        sa.Column("superseded", sa.Boolean, nullable=False),
        sa.Column("kept", sa.Boolean, nullable=False, index=True),
    )
    in_force = sa.text("NOT superseded")
    op.create_index(
        "one_round_in_force", "rounds", ["round"], unique=True, sqlite_where=in_force, postgresql_where=in_force
    )
    op.create_table(
        "sealing",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
    )
    op.create_table("dropping", sa.Column("name", sa.Text, primary_key=True))
    op.create_table(
        "devices",
        sa.Column("device_id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("report", sa.Text, nullable=False),
        sa.Column("first_seen", sa.Double, nullable=False),
        sa.Column("last_seen", sa.Double, nullable=False),
    )
    op.create_table(
        "tasks",
        sa.Column("task_id", sa.Text, primary_key=True),
        sa.Column("round", sa.Integer, nullable=False, index=True),
        sa.Column("device_id", sa.Text, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("plan", sa.Text, nullable=False),
        sa.Column("sample_count", sa.BigInteger, nullable=False),
        sa.Column("given_at", sa.Double, nullable=False),
        sa.UniqueConstraint("round", "device_id", name="one_task_a_round"),
    )
    op.create_table(
        "updates",
        sa.Column("task_id", sa.Text, primary_key=True),
        sa.Column("round", sa.Integer, nullable=False, index=True),
        sa.Column("device_id", sa.Text, nullable=False),
        sa.Column("result", sa.Text, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("received_at", sa.Double, nullable=False),
        sa.Column("norm", sa.Double),
        sa.Column("buffer_norm", sa.Double),
        sa.UniqueConstraint("round", "device_id", name="one_update_a_round"),
    )
    op.create_table(
        "failures",
        sa.Column("status", sa.Text, primary_key=True),
        sa.Column("reason", sa.Text, primary_key=True),
        sa.Column("times", sa.BigInteger, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("task_id", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
    )
