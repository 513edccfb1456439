"""The predicted peak of one stage, by component, from traced unit costs. Pure arithmetic; no torch.

A stage lives through these moments; each holds something else, and the peak is the largest:

    build k    the block's inputs are computed from the inputs of the stage before, without autograd; unit k is running
    logits k   before the first stage of a task that distils from the global model: its logits are computed; unit k runs
    forward k  the units before k have saved their activations, unit k is running
    again k    with checkpointing: unit k runs again, from its input, for its backward pass
    backward k everything up to unit k is still saved, unit k's gradients are computed and used up one by one

The skip connection and the head behind the block run like one more unit, the exit: "forward exit", "backward exit".
With a frozen suffix the units behind the block run before it, named by their numbers as well; they have no gradients
and no optimizer state, and the exit is the whole model's head.
Several models (mutual distillation) have their weights, optimizer state and sums of gradients beside each other, and
run one after the other, so that of one of them at a time there are activations. All but the first run without autograd
before, for what they say of the samples: "logits k".
Convolutions copy what they work on. Each of a unit's is a moment more in every pass, "forward k, convolution 1", so
that its copies are not added to what lives only when another one runs, or none.

The traced numbers see tensors only. Kernels want scratch memory on top, and an allocator its own: that is the device's
calibration, which comes with the cost table. The estimate can be too low, so a plan has to leave a margin
(docs/memory.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedepth.costs import Calibration, Convolution, ModelCosts, PassCost, Size, StepCost, UnitCost
from fedepth.estimate.teachers import kept_logits_bytes, taught
from fedepth.plan import CachePlace, PeakComponents, Stage
from fedepth.task import TrainingSpec

MARGIN_BYTES = 3 << 20
MARGIN_SHARE = 0.08
FLOAT_BYTES = 4

# Beside what it needs, a stage may keep so much of freed memory for the next requests. With less, steps may ask for
# thousands of pages anew; with more, they ask for no fewer, and what is kept nobody can predict (docs/memory.md).
KEPT_SHARE = 0.1
KEPT_BYTES = 1 << 20

_COMPARED = 4  # logits, in size, that a divergence takes beside what is kept of it
Moments = tuple[tuple[str, PeakComponents], ...]

_NOTHING = PeakComponents(0, 0, 0, 0, 0, 0, 0)


def batches_per_epoch(costs: ModelCosts, training: TrainingSpec, sample_count: int) -> int:
    """Optimizer steps of one epoch. Their batches have almost one size, and every sample is in exactly one.

    A batch is larger than the job's only where smaller ones would be too small for BatchNorm.
    """
    wanted = -(-sample_count // training.batch)
    return max(1, min(wanted, sample_count // costs.smallest_micro_batch))


def effective_batch(costs: ModelCosts, training: TrainingSpec, sample_count: int) -> int:
    """Samples of the larger optimizer steps; the smaller ones have one less, if there are any."""
    return -(-sample_count // batches_per_epoch(costs, training, sample_count))


def pieces_of(costs: ModelCosts, samples: int, micro_batch: int) -> int:
    """Into how many micro-batches, of almost one size, a step cuts its samples: none is too small for BatchNorm."""
    return max(1, min(-(-samples // micro_batch), samples // costs.smallest_micro_batch))


def keeps_to(costs: ModelCosts, training: TrainingSpec, sample_count: int, micro_batch: int) -> bool:
    """Whether all steps of an epoch can be cut into pieces of at most so many samples, none too small for BatchNorm."""
    batches = batches_per_epoch(costs, training, sample_count)
    sizes = {sample_count // batches, -(-sample_count // batches)}
    return all(-(-size // pieces_of(costs, size, micro_batch)) <= micro_batch for size in sizes)


def cached_sample_bytes(costs: ModelCosts, training: TrainingSpec, first: int) -> int:
    """What one cached input of unit `first` takes: pixels as stored before unit 0, the job's cache type afterwards."""
    if first == 0:
        return costs.raw_input_bytes
    return training.cache_type.row_bytes(costs.units[first].input_bytes // FLOAT_BYTES)


def needed_bytes(predicted_bytes: int) -> int:
    """The budget that a stage with this predicted peak needs: the estimate and its margin."""
    return predicted_bytes + int(predicted_bytes * MARGIN_SHARE) + MARGIN_BYTES


def may_keep_bytes(needed_bytes: int) -> int:
    """What a stage that needs so much may keep of freed memory."""
    return int(needed_bytes * KEPT_SHARE) + KEPT_BYTES


def optimizer_copies(training: TrainingSpec) -> int:
    """Float32 values of optimizer state per trained parameter."""
    return 2 if training.optimizer == "adamw" else int(training.momentum > 0)


@dataclass(frozen=True)
class _Moment:
    """What lives at one moment of a step, without weights, optimizer state and the sum of gradients."""

    name: str
    activations: int
    temporaries: int
    scratch: int
    fresh_gradient: int = 0

    @property
    def size(self) -> int:
        return self.activations + self.temporaries + self.fresh_gradient + self.scratch


@dataclass(frozen=True)
class TrainingStep:
    """One optimizer step of a stage: what lives through all of it, and what comes on top at each of its moments."""

    resident: PeakComponents
    live: tuple[_Moment, ...]
    device: Calibration

    @property
    def peak(self) -> PeakComponents:
        """The worst moment."""
        return _at(self.resident, max(self.live, key=lambda moment: moment.size), self.device)

    @property
    def moments(self) -> Moments:
        """Every moment in order, by name ("forward 3")."""
        return tuple((moment.name, _at(self.resident, moment, self.device)) for moment in self.live)


def training_step(
    costs: ModelCosts,
    training: TrainingSpec,
    first: int,
    last: int,
    micro_batch: int,
    *,
    accumulates: bool,
    cache_bytes: int,
    checkpoint: bool = False,
    frozen_suffix: bool = False,
    models: int = 1,
) -> TrainingStep:
    """Training units `first..last` with `micro_batch` samples per forward pass.

    A parameter is updated, and its gradient freed, as soon as the backward pass is through with it; gradients of
    several micro-batches live until the last of them.

    Args:
        accumulates: gradients of several micro-batches are summed, so that they live through the forward pass.
        cache_bytes: the block's cached inputs in RAM; 0 when they lie on disk. With the logits that are distilled.
        checkpoint: only the units' inputs are kept, and each unit's forward pass runs again before its backward pass.
        frozen_suffix: the units behind the block run as well, frozen.
        models: that are trained, each with the others for teachers.

    Raises:
        ValueError: no block can end behind unit `last`, or be trained through the units behind it.
    """
    suffix = costs.units[last + 1 :] if frozen_suffix else ()
    exit_ = costs.units[-1 if frozen_suffix else last].exit
    if exit_ is None:
        raise ValueError(f"no block of {costs.model} can end behind unit {last}")
    if any(unit.frozen is None for unit in suffix):
        raise ValueError(f"no block of {costs.model} can be trained through all units behind unit {last}")
    block = costs.units[first : last + 1]
    trained = sum(unit.parameter_bytes for unit in (*block, exit_))
    loaded = sum(unit.loaded_bytes for unit in (*block, *suffix, exit_))
    # What the model's author froze is the same in all models, and there once.
    peers = (models - 1) * sum(unit.parameter_bytes + unit.buffer_bytes for unit in (*block, exit_))
    reference = trained if training.proximal_mu > 0 else 0  # FedProx keeps the global weights beside, for the update
    resident = replace(
        _NOTHING,
        parameters=loaded + peers + reference,
        gradients=models * trained if accumulates else 0,
        optimizer_state=models * optimizer_copies(training) * trained,
        activations=models * costs.logit_bytes * micro_batch if models > 1 else 0,  # what they say of the samples
        cache=cache_bytes,
    )
    parts = [_part(str(first + offset), unit, first=offset == 0) for offset, unit in enumerate(block)]
    parts += [_frozen_part(str(last + offset), unit) for offset, unit in enumerate(suffix, 1)]
    exit_ = taught(exit_, costs, training)
    parts.append(_part("exit", exit_ if models == 1 else _distilling(exit_, models, costs.logit_bytes)))
    moments = _checkpointed if checkpoint else _plain
    runs = _Runs(micro_batch, costs.calibration)
    said = _logits(parts, runs) if models > 1 else ()
    return TrainingStep(resident, (*said, *moments(parts, runs)), costs.calibration)


def _at(resident: PeakComponents, moment: _Moment, device: Calibration) -> PeakComponents:
    # The gradient being computed lives beside the sum that it is added to, or beside the weight that it updates.
    needed = replace(
        resident,
        activations=resident.activations + moment.activations,
        temporaries=moment.temporaries,
        scratch=moment.scratch,
        gradients=resident.gradients + moment.fresh_gradient,
    )
    return replace(needed, scratch=needed.scratch + int(device.kept * may_keep_bytes(needed.total)))


@dataclass(frozen=True)
class _Part:
    """A unit, or the exit, in the place that it has in a step.

    Attributes:
        step: its passes there.
        largest_gradient: the largest gradient that its backward pass makes for a parameter.
    """

    name: str
    unit: UnitCost
    step: StepCost
    largest_gradient: int


def _part(name: str, unit: UnitCost, *, first: bool = False) -> _Part:
    """A unit that is trained. At a block's start nobody wants the gradient of the input."""
    step = replace(unit.training, backward=unit.backward_first) if first else unit.training
    return _Part(name, unit, step, unit.largest_parameter_bytes)


def _distilling(exit_: UnitCost, models: int, logit_bytes: int) -> UnitCost:
    """An exit whose loss compares its logits with those of the other models.

    For the backward pass it keeps the logarithms of all models' probabilities. Beside them there are at most as many
    values as four times the logits while differences are summed, or the gradients of two terms are.
    """

    def more(size: Size, times: int) -> Size:
        return Size(size.fixed, size.per_sample + times * logit_bytes)

    step = exit_.training
    training = replace(
        step,
        saved=more(step.saved, models),
        forward=replace(step.forward, peak=more(step.forward.peak, _COMPARED)),
        backward=replace(step.backward, peak=more(step.backward.peak, _COMPARED)),
    )
    return replace(exit_, training=training)


def _frozen_part(name: str, unit: UnitCost) -> _Part:
    assert unit.frozen is not None, "training_step has looked"
    return _Part(name, unit, unit.frozen, 0)


@dataclass(frozen=True)
class _Runs:
    """How units run: with so many samples, on a device."""

    samples: int
    device: Calibration

    def moments(
        self,
        name: str,
        cost: PassCost,
        *,
        held: int,
        loose: int,
        output: int = 0,
        saved: int = 0,
        fresh_gradient: int = 0,
    ) -> Iterator[_Moment]:
        """One pass of a unit.

        Args:
            held: activations that live before, in bytes.
            loose: temporaries that live before.
            output: what the pass returns, if that counts neither as saved nor in its cost.
            saved: of what it adds, what counts as activations.
        """
        fixed = self.device.fixed_bytes
        for number, convolution in enumerate(cost.convolutions, 1):
            own = convolution.living.at(self.samples)
            early = min(own, saved)
            scratch = fixed + copied_bytes(self.device, convolution, self.samples)
            yield _Moment(f"{name}, convolution {number}", held + early, loose + own - early, scratch, fresh_gradient)
        yield _Moment(name, held + saved, loose + output + cost.peak.at(self.samples), fixed, fresh_gradient)

    def forward(self, name: str, part: _Part, *, held: int, loose: int) -> Iterator[_Moment]:
        """The forward pass with autograd."""
        return self.moments(
            name,
            part.step.forward,
            held=held,
            loose=loose,
            output=0 if part.step.saves_output else part.unit.output_bytes * self.samples,
            saved=part.step.saved.at(self.samples),
        )

    def backward(self, name: str, part: _Part, *, held: int) -> Iterator[_Moment]:
        """The backward pass, when the unit's output is gone."""
        return self.moments(
            name,
            part.step.backward,
            held=held,
            loose=0,
            saved=part.step.saved.at(self.samples),
            fresh_gradient=part.largest_gradient,
        )

    def inference(self, name: str, unit: UnitCost, *, held: int, loose: int) -> Iterator[_Moment]:
        """A forward pass without autograd."""
        return self.moments(name, unit.inference, held=held, loose=loose, output=unit.output_bytes * self.samples)


def _plain(parts: Sequence[_Part], runs: _Runs) -> Iterator[_Moment]:
    """Forward and backward pass with everything kept that autograd wants. The last of the `parts` is the exit."""
    held = parts[0].unit.input_bytes * runs.samples  # activations that live before unit k runs
    held_before: list[int] = []
    loose = 0  # the running unit's input, where nobody keeps it for the backward pass
    for part, follower in zip(parts, (*parts[1:], None), strict=True):
        yield from runs.forward(f"forward {part.name}", part, held=held, loose=loose)
        held_before.append(held)
        output = part.unit.output_bytes * runs.samples
        # Between two units: counted once, if either keeps it and the first has not counted it.
        kept = output if follower and follower.step.saves_input and not part.step.saves_output else 0
        held += part.step.saved.at(runs.samples) + kept
        loose = 0 if kept or part.step.saves_output else output
    for part, held in zip(parts[::-1], held_before[::-1], strict=True):
        yield from runs.backward(f"backward {part.name}", part, held=held)


def _logits(parts: Sequence[_Part], runs: _Runs) -> Iterator[_Moment]:
    """A forward pass of all `parts`, of which nothing is kept."""
    for part in parts:
        given = part.unit.input_bytes * runs.samples
        yield from runs.inference(f"logits {part.name}", part.unit, held=0, loose=given)


def _checkpointed(parts: Sequence[_Part], runs: _Runs) -> Iterator[_Moment]:
    """Forward pass without autograd, then each unit's forward and backward pass, from the last to the first."""
    inputs = 0
    inputs_up_to: list[int] = []  # the inputs that are kept when unit k runs, its own included
    for part in parts:
        inputs += part.unit.input_bytes * runs.samples
        inputs_up_to.append(inputs)
        if part is not parts[-1]:
            yield from runs.inference(f"forward {part.name}", part.unit, held=inputs, loose=0)
    for part, inputs in zip(parts[::-1], inputs_up_to[::-1], strict=True):
        gradient = part.unit.output_bytes * runs.samples  # of the output; it waits while the unit runs forwards
        yield from runs.forward(f"again {part.name}", part, held=inputs, loose=gradient)
        yield from runs.backward(f"backward {part.name}", part, held=inputs)


def build_peak(
    costs: ModelCosts,
    source: int,
    first: int,
    build_batch: int,
    *,
    source_bytes: int,
    cache_bytes: int,
    streamed: bool = False,
) -> PeakComponents:
    """The worst moment of computing the inputs of unit `first` from those of unit `source`.

    Args:
        source_bytes: cached inputs of unit `source` that lie in RAM meanwhile.
        cache_bytes: the new cache, if it lies in RAM.
        streamed: one unit at a time is loaded and run over all samples.
    """
    return _worst(
        build_moments(
            costs, source, first, build_batch, source_bytes=source_bytes, cache_bytes=cache_bytes, streamed=streamed
        )
    )


def build_moments(
    costs: ModelCosts,
    source: int,
    first: int,
    build_batch: int,
    *,
    source_bytes: int,
    cache_bytes: int,
    streamed: bool = False,
) -> Moments:
    """Every moment of it in order, by name ("build 3": unit 3 runs); `build_peak` is the largest. Same arguments."""
    units = [(f"build {index}", unit) for index, unit in enumerate(costs.units[source:first], source)]
    if units:
        return _run_through(units, build_batch, costs.calibration, source_bytes + cache_bytes, streamed=streamed)
    samples = costs.input_bytes * build_batch
    moment = _Moment("build", samples, 0, costs.calibration.fixed_bytes)
    return ((moment.name, _at(replace(_NOTHING, cache=cache_bytes), moment, costs.calibration)),)


def logits_peak(costs: ModelCosts, first: int, samples: int, *, cache_bytes: int, streamed: bool) -> PeakComponents:
    """The worst moment of computing the global model's logits from the inputs of unit `first`.

    Args:
        samples: at once.
        cache_bytes: caches in RAM meanwhile: of those inputs, and of the logits.
        streamed: one unit at a time is loaded and run over all samples.
    """
    return _worst(logits_moments(costs, first, samples, cache_bytes=cache_bytes, streamed=streamed))


def logits_moments(costs: ModelCosts, first: int, samples: int, *, cache_bytes: int, streamed: bool) -> Moments:
    """Every moment of it in order, by name ("logits 3", "logits head"). Arguments as for `logits_peak`."""
    units = [(f"logits {index}", unit) for index, unit in enumerate(costs.units[first:], first)]
    head = replace(costs.head, output_bytes=costs.logit_bytes)
    return _run_through([*units, ("logits head", head)], samples, costs.calibration, cache_bytes, streamed=streamed)


def logits_way(costs: ModelCosts, training: TrainingSpec, stage: Stage, sample_count: int) -> tuple[int, bool]:
    """How the global model's logits are computed before a task's first stage is trained: samples at once, and whether
    one unit at a time runs over all of them. The quickest way that takes no more than the stage itself."""
    cached = cache_bytes_in(stage.cache, costs, training, stage.first, sample_count)
    cached += kept_logits_bytes(costs, training, sample_count)
    samples = effective_batch(costs, training, sample_count)
    while samples:
        for streamed in (False, True):
            peak = logits_peak(costs, stage.first, samples, cache_bytes=cached, streamed=streamed)
            if peak.total <= stage.predicted_peak_bytes:
                return samples, streamed
        samples //= 2
    return 1, True


def _run_through(
    units: Sequence[tuple[str, UnitCost]], samples: int, device: Calibration, cache_bytes: int, *, streamed: bool
) -> Moments:
    """Units that run one after the other without autograd, with names for their moments."""
    loaded = sum(unit.loaded_bytes for _, unit in units)
    moments: list[tuple[str, PeakComponents]] = []
    runs = _Runs(samples, device)
    for name, unit in units:
        resident = replace(_NOTHING, parameters=unit.loaded_bytes if streamed else loaded, cache=cache_bytes)
        passes = runs.inference(name, unit, held=0, loose=unit.input_bytes * samples)
        moments.extend((moment.name, _at(resident, moment, device)) for moment in passes)
    return tuple(moments)


def _worst(moments: Moments) -> PeakComponents:
    return max((components for _, components in moments), key=lambda each: each.total)


def cache_bytes_in(place: CachePlace, costs: ModelCosts, training: TrainingSpec, first: int, sample_count: int) -> int:
    """RAM that the cached inputs of unit `first` take; 0 for a cache on disk."""
    return cached_sample_bytes(costs, training, first) * sample_count if place is CachePlace.RAM else 0


def copied_bytes(device: Calibration, convolution: Convolution, samples: int) -> int:
    """What the kernel of a convolution takes while it runs."""
    return int(
        device.kernel_share * convolution.weight_bytes
        + device.depthwise_share * convolution.depthwise_bytes
        + device.reordered_share * convolution.reordered.at(samples)
    )
