"""Learning rates, in exact numbers."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.config import JobConfig
from coordinator.schedule import learning_rate, training_spec


def rates(schedule: str, end: float = 0.0) -> list[float]:
    return [learning_rate(number, 4, 0.8, end, schedule) for number in (1, 2, 3, 4)]


def test_constant_stays() -> None:
    assert rates("constant", 0.1) == [0.8, 0.8, 0.8, 0.8]


def test_linear_falls_evenly_and_the_last_round_still_trains() -> None:
    assert rates("linear") == pytest.approx([0.8, 0.6, 0.4, 0.2], abs=1e-15)
    assert rates("linear", 0.4) == pytest.approx([0.8, 0.7, 0.6, 0.5], abs=1e-15)


def test_cosine_is_at_half_in_the_middle() -> None:
    # cos(pi/4) = 0.7071067811865476
    expected = [0.8, 0.4 * 1.7071067811865476, 0.4, 0.4 * (1 - 0.7071067811865476)]
    assert rates("cosine") == pytest.approx(expected, abs=1e-15)
    assert learning_rate(3, 4, 0.8, 0.2, "cosine") == pytest.approx(0.5, abs=1e-15)


@pytest.mark.parametrize("number", [0, 5])
def test_rounds_outside_the_job_have_no_rate(number: int) -> None:
    with pytest.raises(ValueError, match="not within 1 to 4"):
        learning_rate(number, 4, 0.8, 0.0, "cosine")


def test_the_task_carries_the_rate_and_another_seed_every_round() -> None:
    config = msgspec.convert(
        {
            "job": {"name": "demo", "rounds": 4, "seed": 7},
            "model": {"name": "m", "classes": 2, "input_shape": [1, 8, 8]},
            "test": {"data": "digits"},
            "training": {"learning_rate": 0.8, "schedule": "linear", "proximal_mu": 0.25},
        },
        JobConfig,
    )
    second = training_spec(config, 2)
    assert (second.learning_rate, second.seed, second.proximal_mu) == (pytest.approx(0.6), 9, 0.25)
    assert training_spec(config, 5) == training_spec(config, 4)
