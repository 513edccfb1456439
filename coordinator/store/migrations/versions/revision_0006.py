"""The record has the statistics of a table's columns, where devices were asked for them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("job", sa.Column("statistics", sa.Text, nullable=False, server_default=""))
