"""What training may add now, by what is measured and by what this device has learnt about its trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from edge_client.config import MemoryConfig
from edge_client.identity import recall, remember
from edge_client.memory.probe import Memory, budget_from
from fedepth.budget import Budget
from fedepth.errors import DiskError

# After a death the device plans smaller; five good tasks make up for one death.
_AFTER_DEATH = 0.8
_AFTER_SUCCESS = 0.04
_SMALLEST_SHARE = 0.2
_NOISE_BYTES = 1 << 20  # a start cost that moves by less is not worth a write to an SD card
_log = structlog.get_logger()


@dataclass(frozen=True)
class StartCost:
    """What starting the trainer costs with one version of torch."""

    torch: str
    start_bytes: int


@dataclass(frozen=True)
class Share:
    """The part of the budget that is planned with; below 1 after a trainer has died."""

    share: float


class Budgets:
    """Budgets for training. What it learns is kept in the state directory."""

    def __init__(self, state: Path, config: MemoryConfig, torch: str, measure: Callable[[], Memory]) -> None:
        self._config = config
        self._torch = torch
        self._measure = measure
        self._start_file = state / "start.json"
        self._share_file = state / "share.json"
        start = recall(self._start_file, StartCost)
        self._start = start if start and start.torch == torch else None
        kept = recall(self._share_file, Share)
        self.share = min(1.0, max(_SMALLEST_SHARE, kept.share)) if kept else 1.0

    @property
    def start_bytes(self) -> int | None:
        """What a trainer's start costs; None until one was started with this torch."""
        return self._start.start_bytes if self._start else None

    def budget(self, held_bytes: int = 0, baseline_bytes: int | None = None) -> Budget:
        """The budget now.

        Args:
            held_bytes: what a running trainer holds in all; it counts as free.
            baseline_bytes: what that one needs before it holds weights or data; None for a trainer's start.
        """
        before = (self.start_bytes or 0) if baseline_bytes is None else baseline_bytes
        budget = budget_from(self._measure(), before, self._config, held_bytes)
        return replace(budget, budget_bytes=int(budget.budget_bytes * self.share))

    def learn_start(self, start_bytes: int) -> None:
        if self._start is None or abs(self._start.start_bytes - start_bytes) > _NOISE_BYTES:
            self._start = StartCost(self._torch, start_bytes)
            self._keep(self._start_file, self._start)

    def died(self) -> None:
        """A trainer died: what it was allowed was too much, so later plans are smaller."""
        self._set_share(max(_SMALLEST_SHARE, self.share * _AFTER_DEATH))
        _log.warning("planning smaller from now on", share_of_budget=round(self.share, 2))

    def succeeded(self) -> None:
        if self.share < 1:
            self._set_share(min(1.0, self.share + _AFTER_SUCCESS))

    def _set_share(self, share: float) -> None:
        self.share = share
        self._keep(self._share_file, Share(share))

    def _keep(self, path: Path, value: StartCost | Share) -> None:
        try:
            remember(path, value)
        except DiskError as error:
            _log.warning("what was learnt is kept in memory only, until the agent ends", error=str(error))
