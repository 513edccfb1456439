"""The predicted peak of one stage, by component, from traced unit costs. Pure arithmetic; no torch.

A stage lives through these moments; each holds something else, and the peak is the largest:

    build      the block's inputs are computed from the inputs of the stage before, without autograd
    forward k  the units before k have saved their activations, unit k is running
    exit       the skip connection and the head run forward, then backward
    backward k everything up to unit k is still saved, unit k's gradients are being computed
    update     all gradients and the optimizer state, no activations

The traced numbers see tensors only. Kernels want scratch memory on top; over the configurations measured, the larger of
the largest activation and the largest parameter, plus 4 MiB, covered it (docs/memory.md).
"""

from __future__ import annotations

from dataclasses import replace

from fedepth.task import CachePlace, ModelCosts, PeakComponents, TrainingSpec

SCRATCH_FIXED_BYTES = 4 << 20

_NOTHING = PeakComponents(0, 0, 0, 0, 0, 0, 0)


def effective_batch(costs: ModelCosts, training: TrainingSpec, sample_count: int) -> int:
    """Samples per optimizer step: the job's batch, or the whole shard where that is smaller."""
    return max(min(training.batch, sample_count), costs.smallest_micro_batch)


def cached_sample_bytes(costs: ModelCosts, first: int) -> int:
    """What one cached input of unit `first` takes: pixels as stored before unit 0, float32 afterwards."""
    return costs.raw_input_bytes if first == 0 else costs.units[first].input_bytes


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
) -> PeakComponents:
    """The worst moment of training units `first..last` with `micro_batch` samples per forward pass.

    Args:
        accumulates: gradients of several micro-batches are summed, so that they live through the forward pass.
        cache_bytes: the block's cached inputs in RAM; 0 when they lie on disk.
    """
    units = costs.units[first : last + 1]
    exit_ = costs.exits[last]
    trainable = [unit.parameter_bytes for unit in units] + [exit_.parameter_bytes]
    buffers = sum(unit.buffer_bytes for unit in units) + exit_.buffer_bytes
    reference = sum(trainable) if training.proximal_mu > 0 else 0  # FedProx keeps the global weights beside
    largest_parameter = max(unit.largest_parameter_bytes for unit in (*units, exit_))
    resident = replace(
        _NOTHING,
        parameters=sum(trainable) + buffers + reference,
        optimizer_state=optimizer_copies(training) * sum(trainable),
        scratch=_scratch(micro_batch, [unit.largest_activation_bytes for unit in (*units, exit_)], largest_parameter),
        cache=cache_bytes,
    )

    saved = [unit.saved.at(micro_batch) for unit in (*units, exit_)]
    kept_outputs = [  # between unit k and what follows: once, if either side keeps it and the unit has not counted it
        unit.output_bytes * micro_batch if follower.saves_input and not unit.saves_output else 0
        for unit, follower in zip(units, (*units[1:], exit_), strict=True)
    ]
    held = units[0].input_bytes * micro_batch  # activations that live before unit k runs
    moments: list[tuple[int, int, int]] = []  # (activations, temporaries, gradients)
    gradients_before = sum(trainable) if accumulates else 0
    held_after: list[int] = []
    loose = 0  # the running unit's input, where nobody keeps it for the backward pass
    for k, step in enumerate((*units, exit_)):
        output = 0 if step.saves_output else step.output_bytes * micro_batch
        moments.append((held + saved[k], loose + output + step.forward.at(micro_batch), gradients_before))
        held_after.append(held + saved[k])  # when the backward pass comes back here, the unit's output is gone
        kept = kept_outputs[k] if k < len(units) else 0
        held += saved[k] + kept
        loose = 0 if kept or step.saves_output else step.output_bytes * micro_batch
    gradients = gradients_before
    for k in range(len(units), -1, -1):
        step = (*units, exit_)[k]
        # A fresh gradient and the sum it is added to live side by side, one parameter at a time.
        fresh = step.largest_parameter_bytes if accumulates else trainable[k]
        moments.append((held_after[k], step.backward.at(micro_batch) + fresh, gradients))
        gradients += 0 if accumulates else trainable[k]
    moments.append((0, largest_parameter, sum(trainable)))
    return max(
        (
            replace(resident, activations=activations, temporaries=temporaries, gradients=gradient_bytes)
            for activations, temporaries, gradient_bytes in moments
        ),
        key=lambda peak: peak.total,
    )


def build_peak(
    costs: ModelCosts, source: int, first: int, build_batch: int, *, source_bytes: int, cache_bytes: int
) -> PeakComponents:
    """The worst moment of computing the inputs of unit `first` from those of unit `source`.

    Args:
        source_bytes: cached inputs of unit `source` that lie in RAM meanwhile.
        cache_bytes: the new cache, if it lies in RAM.
    """
    units = costs.units[source:first]
    if not units:
        return replace(_NOTHING, cache=cache_bytes, activations=costs.input_bytes * build_batch)
    live = [(u.input_bytes + u.output_bytes) * build_batch + u.inference.at(build_batch) for u in units]
    return replace(
        _NOTHING,
        parameters=sum(unit.parameter_bytes + unit.buffer_bytes for unit in units),
        temporaries=max(live),
        scratch=_scratch(
            build_batch,
            [unit.largest_activation_bytes for unit in units],
            max(unit.largest_parameter_bytes for unit in units),
        ),
        cache=source_bytes + cache_bytes,
    )


def cache_bytes_in(place: CachePlace, costs: ModelCosts, first: int, sample_count: int) -> int:
    """RAM that the cached inputs of unit `first` take; 0 for a cache on disk."""
    return cached_sample_bytes(costs, first) * sample_count if place is CachePlace.RAM else 0


def _scratch(samples: int, activations_per_sample: list[int], largest_parameter: int) -> int:
    return max(samples * max(activations_per_sample), largest_parameter) + SCRATCH_FIXED_BYTES
