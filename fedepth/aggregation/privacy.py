"""Central differential privacy: the noisy mean (`rules.PrivateMean`), and what rounds of it have spent.

The coordinator is trusted: it sees every update. What is private is what leaves it with the weights. Accuracies and the
list of who took part are not covered, and what is left out of a round must not depend on other updates of it. The noise
comes from numpy's PCG64, seeded by the operating system; it is not a cryptographic generator, and the arithmetic is
that of floating-point numbers (Mironov, "On significance of the least significant bits for differential privacy", CCS
2012).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from fedepth.aggregation.rules import PrivateMean
from fedepth.aggregation.updates import OpenUpdate, squared_change, tensor_spans
from fedepth.errors import ConfigError
from fedepth.weights import Array, Reader


class NoisyMean:
    """The mean of clipped changes with noise, tensor by tensor. Its generator moves on with every tensor asked for.

    Args:
        old: the weights before.
        updates: in their fixed order.
        names: all floating-point parameters of the model, held by an update or not.
    """

    def __init__(self, old: Reader, updates: Sequence[OpenUpdate], names: Sequence[str], rule: PrivateMean) -> None:
        self._old = old
        self._rule = rule
        self._random = np.random.default_rng(rule.seed)
        self._clipped = [(update, self._scale(update, names)) for update in updates]

    def values(self, name: str) -> Iterator[Array]:
        """The new value of a parameter, as float64 in flat slices."""
        rule = self._rule
        deviation = rule.noise_multiplier * rule.clip_norm / rule.updates
        for first, length in tensor_spans(self._old, name):
            total = np.zeros(length, np.float64)
            for update, scale in self._clipped:
                if name in update.tensors:
                    total += scale * update.tensors[name].change(name, first, length)
            total /= rule.updates
            total += deviation * self._random.standard_normal(length)
            total += self._old.read_flat(name, first, length)
            yield total

    def _scale(self, update: OpenUpdate, names: Sequence[str]) -> float:
        held = [name for name in names if name in update.tensors]
        norm = math.sqrt(squared_change(update.tensors, held))
        return self._rule.clip_norm / norm if norm > self._rule.clip_norm else 1.0


def spent_epsilon(noise_multipliers: Sequence[float], delta: float) -> float:
    """The ε for which rounds with these noise multipliers are (ε, δ)-differentially private: one device more or less.

    It holds for a device that took part in every round. Nothing is gained by sampling: devices are drawn from those
    that wait, so that who takes part is decided by who is there, and can be seen. Gaussian noise composes without loss:
    rounds with the multipliers zᵢ are once with z, where 1 / z² is the sum of all 1 / zᵢ² (Dong et al., arXiv
    1905.02383, corollary 3.3), for which dp-accounting has the exact ε (Balle and Wang, arXiv 1805.06530, theorem 8).
    What a change was clipped to does not matter, since noise is in units of it. Infinite if a round had no noise.

    Raises:
        ConfigError: dp-accounting is not installed.
        ValueError: δ is not between 0 and 1, or another number is negative.
    """
    if not 0 < delta < 1 or not all(each >= 0 for each in noise_multipliers):
        raise ValueError(f"noise multipliers {list(noise_multipliers[:10])}, delta {delta}")
    if not noise_multipliers:
        return 0.0
    if min(noise_multipliers) == 0:
        return math.inf
    try:
        from dp_accounting import get_epsilon_gaussian  # more than a second, with scipy: only where it is asked for
    except ImportError:
        raise ConfigError(
            "[privacy] needs dp-accounting to tell what is spent: pip install 'fedepth[privacy]'"
        ) from None
    together = 1 / math.sqrt(math.fsum(each**-2 for each in noise_multipliers))
    return float(get_epsilon_gaussian(together, delta))
