"""The learning rate of each round, and with it what devices are told to train."""

from __future__ import annotations

import math

from coordinator.config import JobConfig
from fedepth.task import TrainingSpec


def learning_rate(round_number: int, rounds: int, start: float, end: float, schedule: str) -> float:
    """The learning rate of round `round_number` of 1..`rounds`.

    The first round has `start`; `end` is what a round after the last would have, so that the last round still
    trains when `end` is 0. With p = (round − 1) / rounds:

        constant  start
        linear    start + (end − start) · p
        cosine    end + (start − end) · (1 + cos(π p)) / 2    (arXiv 1608.03983, equation 5)
    """
    if not 1 <= round_number <= rounds:
        raise ValueError(f"round {round_number} is not within 1 to {rounds}")
    done = (round_number - 1) / rounds
    if schedule == "constant":
        return start
    if schedule == "linear":
        return start + (end - start) * done
    if schedule == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
    raise ValueError(f"unknown schedule {schedule!r}")


def training_spec(config: JobConfig, round_number: int) -> TrainingSpec:
    """What a device is told for this round. Rounds beyond the last are told what the last is."""
    section = config.training
    number = min(max(round_number, 1), config.job.rounds)
    return TrainingSpec(
        batch=section.batch,
        local_epochs=section.local_epochs,
        optimizer=section.optimizer,
        learning_rate=learning_rate(
            number, config.job.rounds, section.learning_rate, section.learning_rate_end, section.schedule
        ),
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        proximal_mu=section.proximal_mu,
        augmentation=section.augmentation,
        seed=config.job.seed + number,  # other shuffles in every round, the same after a restart
        cache_type=section.cache_type,
    )
