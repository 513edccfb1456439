"""The predicted peak of one stage, by component, from traced unit costs. Pure arithmetic; no torch.

A stage lives through these moments; each holds something else, and the peak is the largest:

    build k    the block's inputs are computed from the inputs of the stage before, without autograd; unit k is running
    forward k  the units before k have saved their activations, unit k is running
    again k    with checkpointing: unit k runs again, from its input, for its backward pass
    backward k everything up to unit k is still saved, unit k's gradients are computed and used up one by one

The skip connection and the head behind the block run like one more unit, the exit: "forward exit", "backward exit".

The traced numbers see tensors only. Kernels want scratch memory on top, and an allocator its own: that is the device's
calibration, which comes with the cost table. The estimate can be too low, so a plan has to leave a margin
(docs/memory.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedepth.task import CachePlace, ModelCosts, PeakComponents, TrainingSpec, UnitCost

MARGIN_BYTES = 2 << 20
MARGIN_SHARE = 0.06
FOOTPRINT_BYTES = 1 << 20
FOOTPRINT_SHARE = 0.03
FLOAT_BYTES = 4

_NOTHING = PeakComponents(0, 0, 0, 0, 0, 0, 0)


def effective_batch(costs: ModelCosts, training: TrainingSpec, sample_count: int) -> int:
    """Samples per optimizer step: the job's batch, or the whole shard where that is smaller."""
    return max(min(training.batch, sample_count), costs.smallest_micro_batch)


def cached_sample_bytes(costs: ModelCosts, training: TrainingSpec, first: int) -> int:
    """What one cached input of unit `first` takes: pixels as stored before unit 0, the job's cache type afterwards."""
    if first == 0:
        return costs.raw_input_bytes
    return training.cache_type.row_bytes(costs.units[first].input_bytes // FLOAT_BYTES)


def needed_bytes(predicted_bytes: int) -> int:
    """The budget that a stage with this predicted peak needs: the estimate and its margin."""
    return predicted_bytes + int(predicted_bytes * MARGIN_SHARE) + MARGIN_BYTES


def footprint_bytes(predicted_bytes: int) -> int:
    """What an allocator that keeps freed pages may hold in all, so that its footprint follows the tensors."""
    return predicted_bytes + int(predicted_bytes * FOOTPRINT_SHARE) + FOOTPRINT_BYTES


def optimizer_copies(training: TrainingSpec) -> int:
    """Float32 values of optimizer state per trained parameter."""
    return 2 if training.optimizer == "adamw" else int(training.momentum > 0)


def training_peak(
    costs: ModelCosts,
    training: TrainingSpec,
    first: int,
    last: int,
    micro_batch: int,
    *,
    accumulates: bool,
    cache_bytes: int,
    checkpoint: bool = False,
) -> PeakComponents:
    """The worst moment of training units `first..last` with `micro_batch` samples per forward pass.

    A parameter is updated, and its gradient freed, as soon as the backward pass is through with it; gradients of
    several micro-batches live until the last of them.

    Args:
        accumulates: gradients of several micro-batches are summed, so that they live through the forward pass.
        cache_bytes: the block's cached inputs in RAM; 0 when they lie on disk.
        checkpoint: only the units' inputs are kept, and each unit's forward pass runs again before its backward pass.
    """
    resident, live = _step(
        costs,
        training,
        first,
        last,
        micro_batch,
        accumulates=accumulates,
        cache_bytes=cache_bytes,
        checkpoint=checkpoint,
    )
    return _at(resident, max(live, key=lambda moment: moment.size))


def training_moments(
    costs: ModelCosts,
    training: TrainingSpec,
    first: int,
    last: int,
    micro_batch: int,
    *,
    accumulates: bool,
    cache_bytes: int,
    checkpoint: bool = False,
) -> tuple[tuple[str, PeakComponents], ...]:
    """Every moment of one step in order, by name ("forward 3"); `training_peak` is the largest. Same arguments."""
    resident, live = _step(
        costs,
        training,
        first,
        last,
        micro_batch,
        accumulates=accumulates,
        cache_bytes=cache_bytes,
        checkpoint=checkpoint,
    )
    return tuple((moment.name, _at(resident, moment)) for moment in live)


@dataclass(frozen=True)
class _Moment:
    """What lives at one moment of a step, without weights, optimizer state and the sum of gradients."""

    name: str
    activations: int
    temporaries: int
    fresh_gradient: int = 0

    @property
    def size(self) -> int:
        return self.activations + self.temporaries + self.fresh_gradient


def _at(resident: PeakComponents, moment: _Moment) -> PeakComponents:
    # The gradient being computed lives beside the sum that it is added to, or beside the weight that it updates.
    return replace(
        resident,
        activations=moment.activations,
        temporaries=moment.temporaries,
        gradients=resident.gradients + moment.fresh_gradient,
    )


def _step(
    costs: ModelCosts,
    training: TrainingSpec,
    first: int,
    last: int,
    micro_batch: int,
    *,
    accumulates: bool,
    cache_bytes: int,
    checkpoint: bool,
) -> tuple[PeakComponents, Iterator[_Moment]]:
    """What lives through the whole step, and what comes on top at each of its moments."""
    units = costs.units[first : last + 1]
    exit_ = costs.exits[last]
    trainable = [unit.parameter_bytes for unit in units] + [exit_.parameter_bytes]
    buffers = sum(unit.buffer_bytes for unit in units) + exit_.buffer_bytes
    reference = sum(trainable) if training.proximal_mu > 0 else 0  # FedProx keeps the global weights beside
    resident = replace(
        _NOTHING,
        parameters=sum(trainable) + buffers + reference,
        gradients=sum(trainable) if accumulates else 0,
        optimizer_state=optimizer_copies(training) * sum(trainable),
        scratch=_scratch(costs, (*units, exit_), micro_batch),
        cache=cache_bytes,
    )
    names = (*(str(unit) for unit in range(first, last + 1)), "exit")
    moments = _checkpointed if checkpoint else _plain
    return resident, moments(names, units, exit_, micro_batch)


def _plain(names: Sequence[str], units: Sequence[UnitCost], exit_: UnitCost, samples: int) -> Iterator[_Moment]:
    """Forward and backward pass with everything kept that autograd wants. `names` are those of units and exit."""
    steps = (*units, exit_)
    held = units[0].input_bytes * samples  # activations that live before unit k runs
    held_after: list[int] = []
    loose = 0  # the running unit's input, where nobody keeps it for the backward pass
    for name, step, follower in zip(names, steps, (*steps[1:], None), strict=True):
        saved, output = step.saved.at(samples), step.output_bytes * samples
        made = 0 if step.saves_output else output
        yield _Moment(f"forward {name}", held + saved, loose + made + step.forward.at(samples))
        held_after.append(held + saved)  # when the backward pass comes back here, the unit's output is gone
        # Between two units: counted once, if either keeps it and the first has not counted it.
        kept = output if follower and follower.saves_input and not step.saves_output else 0
        held += saved + kept
        loose = 0 if kept or step.saves_output else output
    for name, step, held in zip(reversed(names), reversed(steps), reversed(held_after), strict=True):
        yield _Moment(f"backward {name}", held, step.backward.at(samples), step.largest_parameter_bytes)


def _checkpointed(names: Sequence[str], units: Sequence[UnitCost], exit_: UnitCost, samples: int) -> Iterator[_Moment]:
    """Forward pass without autograd, then each unit's forward and backward pass, from the last to the first."""
    steps = (*units, exit_)
    inputs = 0
    inputs_up_to: list[int] = []  # the inputs that are kept when unit k runs, its own included
    for name, step in zip(names, steps, strict=True):
        inputs += step.input_bytes * samples
        inputs_up_to.append(inputs)
        if step is not exit_:
            yield _Moment(f"forward {name}", inputs, step.output_bytes * samples + step.inference.at(samples))
    for name, step, inputs in zip(reversed(names), reversed(steps), reversed(inputs_up_to), strict=True):
        saved, output = step.saved.at(samples), step.output_bytes * samples
        made = 0 if step.saves_output else output
        # In the forward pass the gradient of the output waits already.
        yield _Moment(f"again {name}", inputs + saved, output + made + step.forward.at(samples))
        yield _Moment(f"backward {name}", inputs + saved, step.backward.at(samples), step.largest_parameter_bytes)


def build_peak(
    costs: ModelCosts, source: int, first: int, build_batch: int, *, source_bytes: int, cache_bytes: int
) -> PeakComponents:
    """The worst moment of computing the inputs of unit `first` from those of unit `source`.

    Args:
        source_bytes: cached inputs of unit `source` that lie in RAM meanwhile.
        cache_bytes: the new cache, if it lies in RAM.
    """
    resident, live = _build(costs, source, first, build_batch, source_bytes=source_bytes, cache_bytes=cache_bytes)
    return _at(resident, max(live, key=lambda moment: moment.size))


def build_moments(
    costs: ModelCosts, source: int, first: int, build_batch: int, *, source_bytes: int, cache_bytes: int
) -> tuple[tuple[str, PeakComponents], ...]:
    """Every moment of it in order, by name ("build 3": unit 3 runs); `build_peak` is the largest. Same arguments."""
    resident, live = _build(costs, source, first, build_batch, source_bytes=source_bytes, cache_bytes=cache_bytes)
    return tuple((moment.name, _at(resident, moment)) for moment in live)


def _build(
    costs: ModelCosts, source: int, first: int, build_batch: int, *, source_bytes: int, cache_bytes: int
) -> tuple[PeakComponents, Sequence[_Moment]]:
    """What lives while all inputs are computed, and what comes on top as each unit runs."""
    units = costs.units[source:first]
    if not units:
        return replace(_NOTHING, cache=cache_bytes), [_Moment("build", costs.input_bytes * build_batch, 0)]
    resident = replace(
        _NOTHING,
        parameters=sum(unit.parameter_bytes + unit.buffer_bytes for unit in units),
        scratch=_scratch(costs, units, build_batch),
        cache=source_bytes + cache_bytes,
    )
    live = ((unit.input_bytes + unit.output_bytes) * build_batch + unit.inference.at(build_batch) for unit in units)
    return resident, [_Moment(f"build {index}", 0, temporaries) for index, temporaries in enumerate(live, source)]


def cache_bytes_in(place: CachePlace, costs: ModelCosts, training: TrainingSpec, first: int, sample_count: int) -> int:
    """RAM that the cached inputs of unit `first` take; 0 for a cache on disk."""
    return cached_sample_bytes(costs, training, first) * sample_count if place is CachePlace.RAM else 0


def _scratch(costs: ModelCosts, units: Sequence[UnitCost], samples: int) -> int:
    device = costs.calibration
    return device.fixed_bytes + int(
        device.activation_share * samples * max(unit.largest_activation_bytes for unit in units)
        + device.parameter_share * max(unit.largest_parameter_bytes for unit in units)
        + device.convolution_bytes * sum(unit.convolutions for unit in units)
    )
