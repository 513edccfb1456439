"""What every block of a model needs, in bytes: the sums of fedepth.estimate.peak without their components.

The planner asks for thousands of blocks. Moments are therefore not listed anew for each: what lives before a unit runs
is a difference of two prefix sums, so that the largest moment of a block is a running maximum plus what depends on its
first unit alone. Figures are exact: a block fits here if and only if `training_step` says so. Pure; no torch.

"Raw" bytes lack what the allocator keeps and the margin; both only grow with them (`raw_limit`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from itertools import accumulate

from fedepth.costs import Calibration, ModelCosts, PassCost, Size, StepCost, UnitCost
from fedepth.estimate.peak import copied_bytes, may_keep_bytes, needed_bytes, optimizer_copies
from fedepth.estimate.teachers import taught
from fedepth.task import TrainingSpec

IMPOSSIBLE = 1 << 80  # what a block needs that there cannot be; more than any sum of sizes


def with_kept(raw_bytes: int, device: Calibration) -> int:
    """The predicted peak: raw bytes, and what the allocator keeps beside them."""
    return raw_bytes + int(device.kept * may_keep_bytes(raw_bytes))


def raw_limit(budget_bytes: int, device: Calibration) -> int:
    """The most raw bytes that fit into a budget; -1 if none do."""
    low, high = -1, max(0, budget_bytes)
    while low < high:
        middle = (low + high + 1) // 2
        if needed_bytes(with_kept(middle, device)) <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    return low


class Table:
    """What every block needs with one micro-batch, checkpointed or not, and ended in one way.

    need(first, last) = begin[first] + loaded[last] + max(own[first], inner[first + 1 .. last], end[last])

    Args:
        begin: what depends on the first unit alone.
        own: the largest moment of each unit where it is the first.
        inner: the same where it is not.
        loaded: what lives through the whole step, of all units up to the last and of what follows the block.
        end: the largest moment of what follows the block.
    """

    def __init__(self, begin: list[int], own: list[int], inner: list[int], loaded: list[int], end: list[int]) -> None:
        self._begin = begin
        self._own = own
        self._inner = inner
        self._loaded = loaded
        self._end = end
        self._rows: dict[int, list[int]] = {}

    def need(self, first: int, last: int) -> int:
        """Raw bytes of one block, its inputs on disk."""
        return self._begin[first] + self._loaded[last] + max(self._row(first)[last - first], self._end[last])

    def needs(self, first: int) -> list[int]:
        """The same for every last unit from `first` on."""
        begin = self._begin[first]
        return [
            begin + loaded + (most if most > end else end)
            for loaded, most, end in zip(self._loaded[first:], self._row(first), self._end[first:], strict=True)
        ]

    def _row(self, first: int) -> list[int]:
        """The largest moment of the units from `first` to each later one."""
        row = self._rows.get(first)
        if row is None:
            row = self._rows[first] = list(accumulate((self._own[first], *self._inner[first + 1 :]), max))
        return row


class Needs:
    """Tables for one model and one way to train it, made when they are first asked for."""

    def __init__(self, costs: ModelCosts, training: TrainingSpec, batch: int) -> None:
        costs = _with_teachers(costs, training)
        self._units = costs.units
        self._device = costs.calibration
        self._head = costs.head
        self._logit_bytes = costs.logit_bytes
        self._raw_input_bytes = costs.input_bytes
        self._batch = batch
        # Per trained byte: optimizer state, and the global weights that FedProx keeps.
        self._copies = optimizer_copies(training) + (1 if training.proximal_mu > 0 else 0)
        self._bounds = _Bounds(costs)
        self._tables: dict[tuple[int, bool, bool], Table] = {}
        self._runs: dict[int, list[int]] = {}
        self._passes: dict[int, tuple[list[tuple[int, int, int]], list[tuple[int, int]]]] = {}
        self._loaded: dict[tuple[bool, bool], tuple[list[int], list[int]]] = {}

    def table(self, micro_batch: int, *, checkpoint: bool, frozen_suffix: bool) -> Table:
        """Blocks that end at an exit, or with a frozen suffix."""
        key = (micro_batch, checkpoint, frozen_suffix)
        found = self._tables.get(key)
        if found is None:
            make = self._checkpointed if checkpoint else self._plain
            found = self._tables[key] = make(micro_batch, frozen_suffix)
        return found

    def building(self, source: int, first: int, samples: int, *, streamed: bool) -> int:
        """Raw bytes of computing the inputs of unit `first` from those of unit `source`, caches not counted."""
        if source == first:
            return self._device.fixed_bytes + self._raw_input_bytes * samples
        runs = self.runs(samples)[source:first]
        loaded = [unit.loaded_bytes for unit in self._units[source:first]]
        if streamed:
            return max(map(int.__add__, loaded, runs))
        return sum(loaded) + max(runs)

    def head_alone(self, samples: int) -> int:
        """Raw bytes of the head loaded and run without autograd."""
        most = _Bound(self._head.inference, Size(0, self._logit_bytes), 0, self._device).at(samples)
        return self._head.loaded_bytes + self._device.fixed_bytes + self._head.input_bytes * samples + most

    def runs(self, samples: int) -> list[int]:
        """What a forward pass of each unit takes without autograd, beside its weights."""
        if samples not in self._runs:
            fixed = self._device.fixed_bytes
            self._runs[samples] = [
                fixed + unit.input_bytes * samples + bound.at(samples)
                for unit, bound in zip(self._units, self._bounds.inference, strict=True)
            ]
        return self._runs[samples]

    def _loaded_with(self, accumulates: bool, frozen_suffix: bool) -> tuple[list[int], list[int]]:
        """Bytes that live through a step: of all units before each one, and up to a block's end with what follows."""
        key = (accumulates, frozen_suffix)
        if key not in self._loaded:
            self._loaded[key] = self._sum_loaded(accumulates, frozen_suffix)
        return self._loaded[key]

    def _sum_loaded(self, accumulates: bool, frozen_suffix: bool) -> tuple[list[int], list[int]]:
        copies = self._copies + int(accumulates)  # the sum of gradients

        def trained(unit: UnitCost) -> int:
            return unit.loaded_bytes + copies * unit.parameter_bytes

        before = list(accumulate(map(trained, self._units), initial=0))
        if not frozen_suffix:
            return before, [
                IMPOSSIBLE if unit.exit is None else up_to + trained(unit.exit)
                for unit, up_to in zip(self._units, before[1:], strict=True)
            ]
        ends, behind = [], trained(self._head)
        for unit, up_to in zip(self._units[::-1], before[:0:-1], strict=True):
            ends.append(up_to + behind)
            behind += IMPOSSIBLE if unit.frozen is None else unit.loaded_bytes
        return before, ends[::-1]

    def _trained(self, samples: int) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
        """What passes with autograd add: of each unit forwards, backwards, and backwards as the first of a block; of
        each unit's exit, or the head, forwards and backwards."""
        if samples not in self._passes:
            bounds = self._bounds
            of_units = [
                (forward.at(samples), backward.at(samples), first.at(samples))
                for forward, backward, first in zip(bounds.forward, bounds.backward, bounds.backward_first, strict=True)
            ]
            # Many exits are one and the same.
            known = {passes: (passes[0].at(samples), passes[1].at(samples)) for passes in dict.fromkeys(bounds.exits)}
            self._passes[samples] = of_units, [known[passes] for passes in bounds.exits]
        return self._passes[samples]

    def _plain(self, samples: int, frozen_suffix: bool) -> Table:
        """Everything is kept that autograd wants (fedepth.estimate.peak._plain)."""
        units, fixed = self._units, self._device.fixed_bytes
        trained, ended = self._trained(samples)
        behind = self._plain_suffix(samples) if frozen_suffix else []
        before, loaded = self._loaded_with(samples < self._batch, frozen_suffix)
        begin, own, inner, ends = [], [], [], []
        held = loose = 0  # of all units before; of the input, where nobody keeps it
        for index, unit in enumerate(units):
            step = unit.training
            forward, backward, backward_first = trained[index]
            begin.append(unit.input_bytes * samples - held - before[index])
            own.append(held + fixed + max(forward, backward_first))
            inner.append(held + fixed + max(loose + forward, backward))
            held += step.saved.at(samples)
            output = unit.output_bytes * samples
            follower = units[index + 1] if index + 1 < len(units) else None
            if not frozen_suffix:
                kept, loose = _between(step, (unit.exit or self._head).training, output)
                forward, backward = ended[index]
                ends.append(held + kept + fixed + max(loose + forward, backward))
            elif follower is None or follower.frozen is None:
                ends.append(0)
            else:
                kept, loose = _between(step, follower.frozen, output)
                forward = self._bounds.frozen[index + 1][0].at(samples)
                ends.append(held + kept + max(fixed + loose + forward, behind[index + 1]))
            if follower is not None:
                kept, loose = _between(step, follower.training, output)
                held += kept
        return Table(begin, own, inner, loaded, ends)

    def _plain_suffix(self, samples: int) -> list[int]:
        """The largest moment of each frozen unit and all behind it, above what lives before; without the first forward
        pass, which depends on what is in front."""
        fixed, bounds = self._device.fixed_bytes, self._bounds
        found: list[int] = []
        most, backward_most = self._trained(samples)[1][-1]
        following, rest = self._head.training, fixed + backward_most
        for index in reversed(range(len(self._units))):
            unit = self._units[index]
            if unit.frozen is None:
                break
            forward, backward = bounds.frozen[index]
            kept, loose = _between(unit.frozen, following, unit.output_bytes * samples)
            grown = unit.frozen.saved.at(samples) + kept
            rest = max(fixed + backward.at(samples), grown + max(fixed + loose + most, rest))
            found.append(rest)
            following, most = unit.frozen, forward.at(samples)
        return [0] * (len(self._units) - len(found)) + found[::-1]

    def _checkpointed(self, samples: int, frozen_suffix: bool) -> Table:
        """Only inputs are kept (fedepth.estimate.peak._checkpointed)."""
        fixed = self._device.fixed_bytes
        trained, ended = self._trained(samples)
        runs = self.runs(samples)
        behind = self._checkpointed_suffix(samples) if frozen_suffix else []
        before, loaded = self._loaded_with(samples < self._batch, frozen_suffix)
        begin, own, inner, ends = [], [], [], []
        held = 0
        for index, unit in enumerate(self._units):
            begin.append(-held - before[index])
            forward, backward, backward_first = trained[index]
            # A run without autograd counts the input of the unit and the scratch as well.
            own_input = unit.input_bytes * samples
            most = max(runs[index] - own_input - fixed, forward + unit.output_bytes * samples)
            held += own_input
            own.append(held + fixed + max(most, backward_first))
            inner.append(held + fixed + max(most, backward))
            if frozen_suffix:
                ends.append(held + behind[index])
            else:
                ends.append(held + self._checkpointed_end(unit.exit or self._head, ended[index], samples))
        return Table(begin, own, inner, loaded, ends)

    def _checkpointed_suffix(self, samples: int) -> list[int]:
        """The largest moment of all that comes behind each unit, above what lives before."""
        bounds, fixed = self._bounds, self._device.fixed_bytes
        found = [self._checkpointed_end(self._head, self._trained(samples)[1][-1], samples)]
        for index in reversed(range(1, len(self._units))):
            unit = self._units[index]
            forward, backward = bounds.frozen[index]
            again = forward.at(samples) + unit.output_bytes * samples
            most = max(bounds.inference[index].at(samples), again, backward.at(samples))
            found.append(unit.input_bytes * samples + max(fixed + most, found[-1]))
        return found[::-1]

    def _checkpointed_end(self, exit_: UnitCost, passes: tuple[int, int], samples: int) -> int:
        forward, backward = passes
        most = max(forward + exit_.output_bytes * samples, backward)
        return exit_.input_bytes * samples + self._device.fixed_bytes + most


def _with_teachers(costs: ModelCosts, training: TrainingSpec) -> ModelCosts:
    """The costs with exits as they are in a step; those that are one and the same stay so."""
    known = {id(unit.exit): taught(unit.exit, costs, training) for unit in costs.units if unit.exit is not None}
    units = (replace(unit, exit=known[id(unit.exit)] if unit.exit is not None else None) for unit in costs.units)
    return replace(costs, units=tuple(units))


class _Bound:
    """The largest moment of one pass by the number of samples, beside the scratch that is the same for all.

    Almost all of its moments grow linearly; of these, one that another outweighs for any number is left out.
    """

    def __init__(self, cost: PassCost, beside: Size, fixed: int, device: Calibration) -> None:
        """`beside`: what lives beside the pass's peak; `fixed`: what lives at all of its moments."""
        lines = [(fixed + beside.fixed + cost.peak.fixed, beside.per_sample + cost.peak.per_sample)]
        curves = []
        for convolution in cost.convolutions:
            if convolution.reordered.per_sample:
                curves.append(convolution)
            else:
                living = convolution.living
                lines.append((fixed + living.fixed + copied_bytes(device, convolution, 0), living.per_sample))
        lines = list(dict.fromkeys(lines))
        self._lines = [
            line for line in lines if not any(o != line and o[0] >= line[0] and o[1] >= line[1] for o in lines)
        ]
        self._curves = curves
        self._fixed = fixed
        self._device = device

    def at(self, samples: int) -> int:
        most = 0
        for fixed, per_sample in self._lines:
            size = fixed + per_sample * samples
            if size > most:
                most = size
        for convolution in self._curves:
            copied = copied_bytes(self._device, convolution, samples)
            most = max(most, self._fixed + convolution.living.at(samples) + copied)
        return most


class _Bounds:
    """Those of each unit's passes.

    Attributes:
        forward: with what is saved, and the output if nobody has counted it.
        backward: with what is saved, and the largest gradient.
        exits: forward and backward pass of each unit's exit, or the head's; the last is the head's.
    """

    def __init__(self, costs: ModelCosts) -> None:
        self._units = costs.units
        self._device = costs.calibration
        head = costs.head
        trained = [self._passes(unit, unit.training, unit.largest_parameter_bytes) for unit in costs.units]
        self.forward = [forward for forward, _ in trained]
        self.backward = [backward for _, backward in trained]
        self.backward_first = [
            _Bound(unit.backward_first, unit.training.saved, unit.largest_parameter_bytes, costs.calibration)
            for unit in costs.units
        ]
        self.inference = [
            _Bound(unit.inference, Size(0, unit.output_bytes), 0, costs.calibration) for unit in costs.units
        ]
        known: dict[int, tuple[_Bound, _Bound]] = {}  # many exits are one and the same
        for unit in costs.units:
            exit_ = unit.exit or head
            if id(exit_) not in known:
                known[id(exit_)] = self._passes(exit_, exit_.training, exit_.largest_parameter_bytes)
        self.exits = [known[id(unit.exit or head)] for unit in costs.units]

    @cached_property
    def frozen(self) -> list[tuple[_Bound, _Bound]]:
        """Forward and backward pass of each unit, frozen; where it cannot be, no block gets this far."""
        return [self._passes(unit, unit.frozen or unit.training, 0) for unit in self._units]

    def _passes(self, unit: UnitCost, step: StepCost, gradient: int) -> tuple[_Bound, _Bound]:
        output = 0 if step.saves_output else unit.output_bytes
        with_output = Size(step.saved.fixed, step.saved.per_sample + output)
        return (
            _Bound(step.forward, with_output, 0, self._device),
            _Bound(step.backward, step.saved, gradient, self._device),
        )


def _between(step: StepCost, follower: StepCost, output: int) -> tuple[int, int]:
    """A unit's output between it and its follower: bytes that are kept for the backward pass, and that are not."""
    if step.saves_output:
        return 0, 0
    return (output, 0) if follower.saves_input else (0, output)
