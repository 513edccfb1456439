"""What every block of a model needs, in bytes: the sums of fedepth.estimate.peak without their components.

The planner asks for thousands of blocks. Moments are therefore not listed anew for each: what lives before a unit runs
is a difference of two prefix sums, so that the largest moment of a block is a running maximum plus what depends on its
first unit alone. Figures are exact: a block fits here if and only if `training_step` says so. Pure; no torch.

"Raw" bytes lack what the allocator keeps and the margin; both only grow with them (`raw_limit`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from fedepth.costs import Calibration, ModelCosts, PassCost, StepCost, UnitCost
from fedepth.estimate.peak import copied_bytes, may_keep_bytes, needed_bytes, optimizer_copies
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


@dataclass(frozen=True)
class Ends:
    """How blocks end, by their last unit: at an exit, or with a frozen suffix.

    Attributes:
        loaded: bytes that live through the whole step, of all units up to the block's last and of what follows it.
        peak: the largest moment of what follows, counted as in `Table.inner`.
    """

    loaded: list[int]
    peak: list[int]


class Table:
    """What every block needs with one micro-batch, checkpointed or not.

    need(first, last) = begin[first] + loaded[last] + max(own[first], inner[first + 1 .. last], peak[last])
    """

    def __init__(self, begin: list[int], own: list[int], inner: list[int], exits: Ends, suffixes: Ends) -> None:
        self._begin = begin
        self._own = own
        self._inner = inner
        self._ends = (exits, suffixes)
        self._rows: dict[int, list[int]] = {}

    def need(self, first: int, last: int, *, frozen_suffix: bool) -> int:
        """Raw bytes of one block, its inputs on disk."""
        ends = self._ends[frozen_suffix]
        return self._begin[first] + ends.loaded[last] + max(self._row(first)[last - first], ends.peak[last])

    def needs(self, first: int, *, frozen_suffix: bool) -> list[int]:
        """The same for every last unit from `first` on."""
        ends, begin = self._ends[frozen_suffix], self._begin[first]
        return [
            begin + loaded + (most if most > peak else peak)
            for loaded, most, peak in zip(ends.loaded[first:], self._row(first), ends.peak[first:], strict=True)
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
        self._units = costs.units
        self._device = costs.calibration
        self._head = costs.head
        self._raw_input_bytes = costs.input_bytes
        self._batch = batch
        # Per trained byte: optimizer state, and the global weights that FedProx keeps.
        self._copies = optimizer_copies(training) + (1 if training.proximal_mu > 0 else 0)
        self._tables: dict[tuple[int, bool], Table] = {}
        self._runs: dict[int, list[int]] = {}
        self._adds: dict[int, _Adds] = {}

    def table(self, micro_batch: int, *, checkpoint: bool) -> Table:
        key = (micro_batch, checkpoint)
        if key not in self._tables:
            adds = self._adds_with(micro_batch)
            self._tables[key] = self._checkpointed(adds) if checkpoint else self._plain(adds)
        return self._tables[key]

    def building(self, source: int, first: int, samples: int, *, streamed: bool) -> int:
        """Raw bytes of computing the inputs of unit `first` from those of unit `source`, caches not counted."""
        if source == first:
            return self._device.fixed_bytes + self._raw_input_bytes * samples
        runs = self.runs(samples)[source:first]
        loaded = [unit.loaded_bytes for unit in self._units[source:first]]
        if streamed:
            return max(map(int.__add__, loaded, runs))
        return sum(loaded) + max(runs)

    def runs(self, samples: int) -> list[int]:
        """What a forward pass of each unit takes without autograd, beside its weights."""
        if samples not in self._runs:
            inference = self._adds_with(samples).inference
            fixed = self._device.fixed_bytes
            self._runs[samples] = [
                fixed + unit.input_bytes * samples + most for unit, most in zip(self._units, inference, strict=True)
            ]
        return self._runs[samples]

    def _adds_with(self, samples: int) -> _Adds:
        if samples not in self._adds:
            self._adds[samples] = _Adds(self._units, self._head, self._device, samples)
        return self._adds[samples]

    def _loaded(self, samples: int) -> tuple[list[int], list[int], list[int]]:
        """Bytes that live through a step: of all units before each one, and up to a block's end with an exit or with a
        frozen suffix."""
        copies = self._copies + (1 if samples < self._batch else 0)  # gradients that are summed up

        def trained(unit: UnitCost) -> int:
            return unit.loaded_bytes + copies * unit.parameter_bytes

        before = list(accumulate(map(trained, self._units), initial=0))
        at_exits = [
            IMPOSSIBLE if unit.exit is None else up_to + trained(unit.exit)
            for unit, up_to in zip(self._units, before[1:], strict=True)
        ]
        at_suffixes, behind = [], trained(self._head)
        for unit, up_to in zip(self._units[::-1], before[:0:-1], strict=True):
            at_suffixes.append(IMPOSSIBLE if behind >= IMPOSSIBLE else up_to + behind)
            behind += IMPOSSIBLE if unit.frozen is None else unit.loaded_bytes
        return before, at_exits, at_suffixes[::-1]

    def _plain(self, adds: _Adds) -> Table:
        """Everything is kept that autograd wants (fedepth.estimate.peak._plain)."""
        units, samples, fixed = self._units, adds.samples, self._device.fixed_bytes
        begin, own, inner = [], [], []
        exit_peaks, suffix_peaks = [], []
        behind = self._plain_suffix(adds)
        before, at_exits, at_suffixes = self._loaded(samples)
        held = loose = 0  # of all units before; of the input, where nobody keeps it
        for index, unit in enumerate(units):
            step = unit.training
            begin.append(unit.input_bytes * samples - held - before[index])
            own.append(held + fixed + max(adds.forward[index], adds.backward_first[index]))
            inner.append(held + fixed + max(loose + adds.forward[index], adds.backward[index]))
            held += adds.saved[index]
            output = unit.output_bytes * samples
            if unit.exit is None:
                exit_peaks.append(0)
            else:
                kept, loose = _between(step, unit.exit.training, output)
                forward, backward = adds.exits[index]
                exit_peaks.append(held + kept + fixed + max(loose + forward, backward))
            follower = units[index + 1] if index + 1 < len(units) else None
            if follower is None or follower.frozen is None:
                suffix_peaks.append(0)
            else:
                kept, loose = _between(step, follower.frozen, output)
                forward, rest = adds.frozen[index + 1][0], behind[index + 1]
                suffix_peaks.append(held + kept + max(fixed + loose + forward, rest))
            if follower is not None:
                kept, loose = _between(step, follower.training, output)
                held += kept
        return Table(begin, own, inner, Ends(at_exits, exit_peaks), Ends(at_suffixes, suffix_peaks))

    def _plain_suffix(self, adds: _Adds) -> list[int]:
        """The largest moment of each frozen unit and all behind it, above what lives before; without the first forward
        pass, which depends on what is in front."""
        fixed = self._device.fixed_bytes
        found: list[int] = []
        following, forward, rest = self._head.training, adds.exits[-1][0], fixed + adds.exits[-1][1]
        for index in reversed(range(len(self._units))):
            unit = self._units[index]
            if unit.frozen is None:
                break
            kept, loose = _between(unit.frozen, following, unit.output_bytes * adds.samples)
            grown = adds.frozen[index][2] + kept
            rest = max(fixed + adds.frozen[index][1], grown + max(fixed + loose + forward, rest))
            found.append(rest)
            following, forward = unit.frozen, adds.frozen[index][0]
        return [0] * (len(self._units) - len(found)) + found[::-1]

    def _checkpointed(self, adds: _Adds) -> Table:
        """Only inputs are kept (fedepth.estimate.peak._checkpointed)."""
        samples, fixed = adds.samples, self._device.fixed_bytes
        begin, own, inner = [], [], []
        exit_peaks, suffix_peaks = [], []
        before, at_exits, at_suffixes = self._loaded(samples)
        forward, backward = adds.exits[-1]
        behind = [self._head.input_bytes * samples + fixed + max(forward + self._head.output_bytes * samples, backward)]
        for index in reversed(range(1, len(self._units))):
            unit = self._units[index]
            forward, backward, _ = adds.frozen[index]
            most = max(adds.inference[index], forward + unit.output_bytes * samples, backward)
            behind.append(unit.input_bytes * samples + max(fixed + most, behind[-1]))
        behind.reverse()  # behind[k] for all that comes after unit k
        held = 0
        for index, unit in enumerate(self._units):
            begin.append(-held - before[index])
            held += unit.input_bytes * samples
            most = max(adds.inference[index], adds.forward[index] + unit.output_bytes * samples)
            own.append(held + fixed + max(most, adds.backward_first[index]))
            inner.append(held + fixed + max(most, adds.backward[index]))
            suffix_peaks.append(held + behind[index])
            if unit.exit is None:
                exit_peaks.append(0)
            else:
                forward, backward = adds.exits[index]
                most = max(forward + unit.exit.output_bytes * samples, backward)
                exit_peaks.append(held + unit.exit.input_bytes * samples + fixed + most)
        return Table(begin, own, inner, Ends(at_exits, exit_peaks), Ends(at_suffixes, suffix_peaks))


class _Adds:
    """What the passes of each unit add at most with so many samples, beside the scratch that is the same for all.

    Attributes:
        forward: with what is saved, and the output if nobody has counted it.
        backward: with what is saved, and the largest gradient.
        exits: forward and backward pass of each unit's exit; the last is the model's head.
        frozen: forward and backward pass of each unit, frozen, and what it saves.
    """

    def __init__(self, units: tuple[UnitCost, ...], head: UnitCost, device: Calibration, samples: int) -> None:
        self.samples = samples
        known: dict[int, tuple[int, int]] = {}  # many exits are one and the same
        self.saved: list[int] = []
        self.forward: list[int] = []
        self.backward: list[int] = []
        self.backward_first: list[int] = []
        self.inference: list[int] = []
        self.exits: list[tuple[int, int]] = []
        self.frozen: list[tuple[int, int, int]] = []

        def passes(unit: UnitCost, step: StepCost) -> tuple[int, int]:
            """Without gradients of parameters."""
            saved = step.saved.at(samples)
            output = 0 if step.saves_output else unit.output_bytes * samples
            return _most(step.forward, saved + output, device, samples), _most(step.backward, saved, device, samples)

        for unit in units:
            saved = unit.training.saved.at(samples)
            forward, backward = passes(unit, unit.training)
            self.saved.append(saved)
            self.forward.append(forward)
            self.backward.append(backward + unit.largest_parameter_bytes)
            first = _most(unit.backward_first, saved, device, samples)
            self.backward_first.append(first + unit.largest_parameter_bytes)
            self.inference.append(_most(unit.inference, unit.output_bytes * samples, device, samples))
            exit_ = unit.exit or head
            if id(exit_) not in known:
                forward, backward = passes(exit_, exit_.training)
                known[id(exit_)] = forward, backward + exit_.largest_parameter_bytes
            self.exits.append(known[id(exit_)])
            frozen = unit.frozen or unit.training  # where there is none, no block gets this far
            self.frozen.append((*passes(unit, frozen), frozen.saved.at(samples)))


def _most(cost: PassCost, beside: int, device: Calibration, samples: int) -> int:
    """The largest moment of one pass: a convolution's, or that in which none runs, with what lives beside its peak."""
    most = beside + cost.peak.at(samples)
    for convolution in cost.convolutions:
        own = convolution.living.at(samples) + copied_bytes(device, convolution, samples)
        if own > most:
            most = own
    return most


def _between(step: StepCost, follower: StepCost, output: int) -> tuple[int, int]:
    """A unit's output between it and its follower: bytes that are kept for the backward pass, and that are not."""
    if step.saves_output:
        return 0, 0
    return (output, 0) if follower.saves_input else (0, output)
