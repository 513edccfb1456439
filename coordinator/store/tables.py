"""The tables of a job's record, as the newest revision in `migrations` leaves them.

A column that may be unknown is NULL then: no number stands for "unknown".
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

job = sa.Table(
    "job",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("prepared", sa.Text, nullable=False),
    sa.Column("settings", sa.Text, nullable=False),  # JSON; "" if a version that did not record them made it
    # Of a table's columns, where devices were asked for them (JSON); "" as long as they were not.
    sa.Column("statistics", sa.Text, nullable=False, server_default=""),
    sa.Column("created_at", sa.Double, nullable=False),
)
# Who had the lock last, of those that may write: one row. It tells one that lost the lock whether another took it.
holder = sa.Table(
    "holder",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
)
# What was changed in the job file between two starts. `before` and `now` are JSON.
changes = sa.Table(
    "changes",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("setting", sa.Text, nullable=False),
    sa.Column("before", sa.Text, nullable=False),
    sa.Column("now", sa.Text, nullable=False),
    sa.Column("accepted", sa.Boolean, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
)
# A round that a rollback took back keeps its number, and the round that replaces it has the same: hence the id.
rounds = sa.Table(
    "rounds",
    metadata,
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
    # What noise it was closed with: multiplier 0 is none, NULL is not known. `delta` is that of `epsilon`.
    sa.Column("noise_multiplier", sa.Double),
    sa.Column("clip_norm", sa.Double),
    sa.Column("delta", sa.Double),
)
sa.Index(
    "one_round_in_force",
    rounds.c.round,
    unique=True,
    sqlite_where=~rounds.c.superseded,
    postgresql_where=~rounds.c.superseded,
)
# The weights that are about to get their name: at most one row.
sealing = sa.Table(
    "sealing",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
)
# Names of files that are about to be deleted.
dropping = sa.Table("dropping", metadata, sa.Column("name", sa.Text, primary_key=True))
devices = sa.Table(
    "devices",
    metadata,
    sa.Column("device_id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("report", sa.Text, nullable=False),
    sa.Column("first_seen", sa.Double, nullable=False),
    sa.Column("last_seen", sa.Double, nullable=False),
)
# `status` is what was said of a task that has no update: given, failed, refused, lost. A row in `updates` is what
# accepts a task.
tasks = sa.Table(
    "tasks",
    metadata,
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
updates = sa.Table(
    "updates",
    metadata,
    sa.Column("task_id", sa.Text, primary_key=True),
    sa.Column("round", sa.Integer, nullable=False, index=True),
    sa.Column("device_id", sa.Text, nullable=False),
    sa.Column("result", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("received_at", sa.Double, nullable=False),
    sa.Column("norm", sa.Double),  # how far its parameters went for each step; NULL if it is not known
    sa.Column("buffer_norm", sa.Double),
    sa.UniqueConstraint("round", "device_id", name="one_update_a_round"),
)
# One row per kind of failure, with the last of its kind.
failures = sa.Table(
    "failures",
    metadata,
    sa.Column("status", sa.Text, primary_key=True),
    sa.Column("reason", sa.Text, primary_key=True),
    sa.Column("times", sa.BigInteger, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("task_id", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
)
