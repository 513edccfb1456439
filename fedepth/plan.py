"""Block plans: which units a client trains together, and the memory that each stage is predicted to take.

Sizes are bytes. No torch, no numpy: an idle agent loads this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum

MOST_MODELS = 8  # that a client trains at once; what more of them teach each other grows ever less


class Policy(str, Enum):
    """How the planner chooses among the plans that fit."""

    PAPER = "paper"  # fixed batch, fewest blocks (arXiv 2303.04887, section 4.1)
    AUTO = "auto"  # fewest depth splits first, by micro-batching where that fits


class CachePlace(str, Enum):
    """Where a stage keeps the inputs of its block."""

    RAM = "ram"
    DISK = "disk"


class CacheType(str, Enum):
    """How cached activations are kept; what is not float32 loses precision (fedepth.training.cache)."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    UINT8 = "uint8"

    def row_bytes(self, values: int) -> int:
        """Bytes of one cached sample of that many values; uint8 keeps two float32 numbers beside them."""
        return {CacheType.FLOAT32: 4 * values, CacheType.FLOAT16: 2 * values, CacheType.UINT8: values + 8}[self]


@dataclass(frozen=True)
class PeakComponents:
    """A predicted peak by component; the peak is the sum."""

    parameters: int
    gradients: int
    optimizer_state: int
    activations: int
    temporaries: int
    scratch: int
    cache: int

    @property
    def total(self) -> int:
        return (
            self.parameters
            + self.gradients
            + self.optimizer_state
            + self.activations
            + self.temporaries
            + self.scratch
            + self.cache
        )


@dataclass(frozen=True)
class Stage:
    """The training of one block: units `first..last`, both included.

    Attributes:
        micro_batch: samples per forward pass; gradients accumulate up to the job's batch.
        cache: where the block's inputs are kept.
        build_batch: samples per forward pass while the inputs are computed from the stage before.
        predicted: the predicted peak by component.
        checkpoint: keep only each unit's input in the forward pass, and compute the rest again in the backward pass.
        build_streamed: while the inputs are computed, the preceding units are read from the weights file one at a time,
            each run over all samples, with its outputs on disk in between.
        frozen_suffix: the loss is computed through the units behind the block, at their global values and in
            evaluation mode, and the head, instead of through the skip connection.
    """

    first: int
    last: int
    micro_batch: int
    cache: CachePlace
    build_batch: int
    predicted: PeakComponents
    checkpoint: bool = False
    build_streamed: bool = False
    frozen_suffix: bool = False

    @property
    def predicted_peak_bytes(self) -> int:
        return self.predicted.total

    @property
    def block(self) -> str:
        """For people: "1-3", or "4"."""
        return _range_text(self.first, self.last)


class Ending(IntEnum):
    """Where a plan's last block leads; the smaller the better.

    LAST_UNIT: it ends with the model's last unit, so that the head is trained on what it will see.
    FROZEN_SUFFIX: its loss is computed through the untrained units behind it (`Stage.frozen_suffix`).
    FROZEN_HEAD: it leads to the head by a skip connection, past untrained units. The head keeps its global value in all
        of the plan's stages: trained on such features it would be a worse one for everybody.
    """

    LAST_UNIT = 0
    FROZEN_SUFFIX = 1
    FROZEN_HEAD = 2


@dataclass(frozen=True)
class Plan:
    """The block plan of one client for one round.

    Attributes:
        stages: in the order of training; together a contiguous range of units.
        untrained: indices of units that keep their global value; without those that the model's author froze in front
            of all others.
        policy: what chose it.
        budget_bytes: what it was made for.
        models: how many are trained, each distilling from the others; one of them is the update. More than one only
            where a single stage trains all units.
    """

    stages: tuple[Stage, ...]
    untrained: tuple[int, ...]
    policy: Policy
    budget_bytes: int
    models: int = 1

    @property
    def predicted_peak_bytes(self) -> int:
        return max(stage.predicted_peak_bytes for stage in self.stages)

    @property
    def trained_units(self) -> tuple[int, ...]:
        """Indices of the units that are trained, in the order of training."""
        return tuple(unit for stage in self.stages for unit in range(stage.first, stage.last + 1))

    @property
    def may_have_peers(self) -> bool:
        """Whether one stage trains all that can be trained, so that more models than one could be."""
        return len(self.stages) == 1 and not self.untrained and not self.stages[0].frozen_suffix

    @property
    def ending(self) -> Ending:
        last = self.stages[-1]
        if last.frozen_suffix:
            return Ending.FROZEN_SUFFIX
        return Ending.FROZEN_HEAD if self.untrained and self.untrained[-1] > last.last else Ending.LAST_UNIT

    @property
    def trains_head(self) -> bool:
        """Whether the head is trained and part of the update."""
        return self.ending is not Ending.FROZEN_HEAD

    @property
    def blocks(self) -> str:
        """For people: "1-3 | 4-6 (untrained: 0)", with a frozen suffix "0-3 | 4-6 through 7-9 (untrained: 7-9)", or
        "0-3 (untrained: 4-9, head)"; "0-9 (2 models)"."""
        text = " | ".join(stage.block for stage in self.stages)
        if self.models > 1:
            text += f" ({self.models} models)"
        if not self.stages or not self.untrained:
            return text
        if self.ending is Ending.FROZEN_SUFFIX:
            text += f" through {_range_text(self.stages[-1].last + 1, self.untrained[-1])}"
        return f"{text} (untrained: {self.untrained_ranges}{'' if self.trains_head else ', head'})"

    @property
    def untrained_ranges(self) -> str:
        """For people: "0-2, 7"."""
        ranges: list[list[int]] = []
        for unit in self.untrained:
            if ranges and unit == ranges[-1][1] + 1:
                ranges[-1][1] = unit
            else:
                ranges.append([unit, unit])
        return ", ".join(_range_text(first, last) for first, last in ranges)


def _range_text(first: int, last: int) -> str:
    return f"{first}-{last}" if last > first else str(first)
