"""How updates become one: the rules and their settings. No numpy: the job file is checked against them.

A tensor is combined over the updates that hold it, its holders; one that nobody trained keeps its value. `aggregate`
applies a rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedepth.errors import ConfigError

Kind = Literal["parameters", "buffers"]

ENOUGH_NORMS = 5
KRUM_EXTRA = 3


@dataclass(frozen=True)
class Norms:
    """The relative change of an update (see `norms`); 0 where it holds nothing of a kind, infinite if it overflows."""

    parameters: float
    buffers: float

    def of(self, kind: Kind) -> float:
        return self.parameters if kind == "parameters" else self.buffers

    def per_step(self, steps: int) -> Norms:
        """What bounds are learned from."""
        return Norms(self.parameters / steps, self.buffers / steps)


@dataclass(frozen=True)
class WeightedMean:
    """The mean over the holders, weighted by their numbers of samples.

    Where all devices train everything, this is FedAvg (McMahan et al., arXiv 1602.05629); with partial updates it is
    the aggregation of depth-wise training (arXiv 2303.04887).
    """


@dataclass(frozen=True)
class TrimmedMean:
    """Per coordinate, the unweighted mean of what is left when the smallest and the largest values are cut off.

    Yin et al., arXiv 1803.01498, definition 2. Of n holders floor(trim · n) are cut at each end; where that is 0, all
    are averaged, and the answer says so.

    Attributes:
        trim: the share to cut at each end, above 0 and below 0.5: the share of devices that may be faulty.
    """

    trim: float

    def __post_init__(self) -> None:
        if not 0 < self.trim < 0.5:
            raise ConfigError(f"a trimmed mean with trim {self.trim}: it must be above 0 and below 0.5")

    def cut(self, holders: int) -> int:
        """How many values are cut at each end."""
        return int(self.trim * holders + 1e-9)  # 0.29 · 100 is 28.999999999999996


@dataclass(frozen=True)
class Median:
    """Per coordinate, the unweighted median of the holders; of an even number, the mean of the two in the middle.

    Yin et al., arXiv 1803.01498, definition 1. Of one or two holders it is the mean, and the answer says so.
    """


@dataclass(frozen=True)
class NormClipping:
    """The weighted mean of updates of which none goes further than a bound (`norms` says how that is measured).

    An update that goes further has its change scaled down to the bound. Parameters and buffers are measured and scaled
    apart.

    Attributes:
        max_change: bound on the relative change of the parameters. None: it is learned from the other updates of the
            round, in proportion to the number of steps. The bound on buffers always is. Where there are too few updates
            to learn from, nothing is clipped, and the answer says so.
    """

    max_change: float | None = None

    def __post_init__(self) -> None:
        if self.max_change is not None and not 0 < self.max_change < math.inf:
            raise ConfigError(
                f"norm clipping with max_change {self.max_change}: it must be above 0 and finite, or None"
            )


@dataclass(frozen=True)
class Krum:
    """The weighted mean of the updates that have the closest company: Multi-Krum.

    Blanchard et al., arXiv 1703.02757, section 4. Only updates of the same tensors can be compared: they are a group.
    The score of an update is the sum of its squared distances to the n − f − 2 nearest of its group of n. The n − f of
    the lowest scores are taken: all of the honest ones, where f are faulty and far away. Taking the single best, as
    Krum itself does, would throw away what most of a few unequal devices have learned. A group of n < 2f + 3 cannot be
    judged: it is taken as it is, and the answer says so.

    Distances are over parameters. Buffers and integers, which they do not judge, get the median of those chosen.

    Attributes:
        faulty: f, how many updates of a round may be faulty; each group is judged as if all of them were in it.
    """

    faulty: int

    def __post_init__(self) -> None:
        if self.faulty < 1:
            raise ConfigError(f"Krum with faulty {self.faulty}: it must be 1 at least; otherwise take the mean")

    @property
    def smallest_group(self) -> int:
        return 2 * self.faulty + KRUM_EXTRA


@dataclass(frozen=True)
class PrivateMean:
    """Differential privacy for whole updates, with a trusted coordinator: clipping, and Gaussian noise.

    McMahan et al., arXiv 1710.06963, algorithm 1 (DP-FedAvg) with the estimator of fixed denominator, flat clipping and
    all user weights 1:

        w ← w + (1/N) · Σ Δ_k · min(1, S / ‖Δ_k‖) + N(0, (z · S / N)² · I)

    One update more or less moves the sum by at most S in the Euclidean norm over all parameters, whichever of them the
    update holds; what it does not hold counts as a change of 0. So the noise goes to every parameter, held or not, and
    the divisor is N everywhere: neither may depend on which device trained what. Buffers and integers, such as the
    statistics of BatchNorm, stay as they are: nothing of an update gets into them.

    Attributes:
        clip_norm: S, the bound on the Euclidean norm of an update's change.
        noise_multiplier: z.
        updates: N, the number of updates that a round is meant to have; fixed, however many it gets.
        seed: of the noise; None, as it must be for privacy, for 128 bits of the operating system's entropy.
    """

    clip_norm: float
    noise_multiplier: float
    updates: int
    seed: int | None = None


Rule = WeightedMean | TrimmedMean | Median | NormClipping | Krum | PrivateMean
