"""Every round says what noise it was closed with."""

from __future__ import annotations

import json
import math

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_TOLERANCE = 1e-3  # by which δ may differ; another multiplier or number of rounds is off by far more


def upgrade() -> None:
    for name in ("noise_multiplier", "clip_norm", "delta"):
        op.add_column("rounds", sa.Column(name, sa.Double))
    rounds = sa.table("rounds", *map(sa.column, ("id", "round", "epsilon", "noise_multiplier", "clip_norm", "delta")))
    connection = op.get_bind()
    text = connection.execute(sa.text("SELECT settings FROM job")).scalar()
    settings = json.loads(text) if text else {}
    multiplier, clip, delta = (settings.get(f"privacy.{name}") for name in ("noise_multiplier", "clip_norm", "delta"))
    closed = connection.execute(sa.select(rounds).where(rounds.c.round > 0).order_by(rounds.c.id)).all()
    for number, row in enumerate(closed, 1):
        if row.epsilon is None:  # what was spent was recorded whenever there was noise
            values: dict[str, object] = {"noise_multiplier": 0.0}
        elif multiplier and delta and _fits(row.epsilon, multiplier, number, delta):
            values = {"noise_multiplier": multiplier, "clip_norm": clip, "delta": delta}
        else:
            continue
        connection.execute(rounds.update().where(rounds.c.id == row.id).values(values))


def _fits(epsilon: float, multiplier: float, number: int, delta: float) -> bool:
    """Whether this is what `number` rounds with this noise spend: the settings may have been others at that time.

    (Balle and Wang, arXiv 1805.06530, theorem 8.)
    """
    away = math.sqrt(number) / multiplier
    try:
        found = _below(away / 2 - epsilon / away) - math.exp(epsilon) * _below(-away / 2 - epsilon / away)
    except (OverflowError, ZeroDivisionError):
        return False
    return abs(found - delta) <= _TOLERANCE * delta


def _below(value: float) -> float:
    return math.erfc(-value / math.sqrt(2)) / 2
