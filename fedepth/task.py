"""The frozen types that travel between processes. No torch, no numpy: an idle agent loads this module.

Sizes are bytes, times are seconds unless the name says otherwise. Shapes exclude the batch dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Policy(str, Enum):
    """How the planner chooses among the plans that fit."""

    PAPER = "paper"  # fixed batch, fewest blocks (arXiv 2303.04887, section 4.1)
    AUTO = "auto"  # fewest depth splits first, by micro-batching where that fits


class Optimizer(str, Enum):
    """The optimizers that a job may name."""

    SGD = "sgd"
    ADAMW = "adamw"


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
class MemoryLimit:
    """One bound on what a process may take.

    Attributes:
        origin: where the bound comes from, such as "MemAvailable" or "/sys/fs/cgroup/user.slice".
        available_bytes: what is left under it now.
        limit_bytes: the bound itself; 0 where there is none besides what is left.
    """

    origin: str
    available_bytes: int
    limit_bytes: int = 0


@dataclass(frozen=True)
class Budget:
    """What training may add on a device, and how that follows from what was measured.

    budget = min(cap, available × fraction − reserve − start), never below 0.

    Attributes:
        total_bytes: physical memory of the device.
        available_bytes: the smallest of `limits`.
        limits: every bound that was found.
        start_bytes: what starting the trainer costs before it holds weights or data.
        reserve_bytes: left to others by the operator's wish.
        fraction: part of the available memory that may be used at all.
        cap_bytes: the operator's cap on the budget; 0 for none.
        budget_bytes: the result.
    """

    total_bytes: int
    available_bytes: int
    limits: tuple[MemoryLimit, ...]
    start_bytes: int
    reserve_bytes: int
    fraction: float
    cap_bytes: int
    budget_bytes: int


@dataclass(frozen=True)
class Calibration:
    """What a backend and its allocator take beside the tensors, as measured on one device (fedepth.memory.calibrate).

    scratch = fixed + kept · what a stage that needs so much may keep (fedepth.memory.predict)
              + kernel_share · weight_bytes + depthwise_share · depthwise_bytes + reordered_share · reordered
                while a convolution of the running unit runs.
    The defaults were measured on a desktop with tcmalloc.

    Attributes:
        allocator: the allocator it was measured with; empty for the defaults.
        torch: the version of torch.
        fixed_bytes: whatever the block: compiled kernels, small blocks that the allocator does not give back.
        kept: of what a stage may keep of freed memory, the part that the allocator does keep.
        kernel_share: of a convolution's weights: reordered copies of them and of their gradient.
        depthwise_share: of a wide depth-wise convolution's weights, whose gradient oneDNN pads to blocks of channels:
            16 × 16 values for one with AVX-512.
        reordered_share: of a convolution's input and output, where they are copied into another layout.
    """

    allocator: str = ""
    torch: str = ""
    fixed_bytes: int = 3 << 17
    kept: float = 0.7
    kernel_share: float = 2.0
    depthwise_share: float = 256.0
    reordered_share: float = 0.95


@dataclass(frozen=True)
class DeviceReport:
    """What a device says of itself when it asks for work."""

    device_id: str
    name: str
    budget: Budget
    sample_count: int
    class_counts: tuple[int, ...]
    hardware: str = ""
    accelerator: str = ""
    software: str = ""
    fedepth_version: str = ""
    calibration: Calibration = Calibration()


@dataclass(frozen=True)
class ModelSpec:
    """Which model a job trains.

    Attributes:
        name: a name from the zoo ("digits-cnn", "preresnet20", …) or "module:function".
        classes: class names in label order.
        input_shape: (channels, height, width).
        mean: per channel, for pixel values in 0..1.
        std: per channel, for pixel values in 0..1.
    """

    name: str
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class TrainingSpec:
    """How a client trains in one round."""

    batch: int
    local_epochs: int
    optimizer: str  # "sgd" or "adamw"
    learning_rate: float
    momentum: float
    weight_decay: float
    proximal_mu: float  # FedProx term; 0 switches it off
    augmentation: str  # "none" or "crop-flip"
    seed: int
    cache_type: CacheType = CacheType.FLOAT32


@dataclass(frozen=True)
class Size:
    """A number of bytes that grows with the batch: `fixed + per_sample · n`."""

    fixed: int
    per_sample: int

    def at(self, samples: int) -> int:
        return self.fixed + self.per_sample * samples


@dataclass(frozen=True)
class Convolution:
    """A convolution in one pass of a unit: what its kernel copies, and what lives while it runs.

    Attributes:
        weight_bytes: its weights, in channels_last.
        depthwise_bytes: its weights, if it is depth-wise, wider than 3, and in channels_last.
        reordered: its weights, and its input and output, outside channels_last.
        living: everything beside the unit's input, the convolution's output among it, but no parameter gradients.
    """

    weight_bytes: int
    depthwise_bytes: int
    reordered: Size
    living: Size


@dataclass(frozen=True)
class PassCost:
    """The most that lives at once in one pass of a unit, beyond what every pass of that kind is known to hold.

    Attributes:
        peak: where no convolution runs, beyond input, output and what is saved; in a backward pass with the gradients
            of input and output counted, parameter gradients not.
        convolutions: its convolutions, without those that another one outweighs in every respect.
    """

    peak: Size
    convolutions: tuple[Convolution, ...] = ()


@dataclass(frozen=True)
class StepCost:
    """A forward and a backward pass of a unit, traced under fake tensors.

    Attributes:
        saved: what autograd keeps for the backward pass, by unique storage, without parameters and without the
            unit's input; includes the output if the unit itself keeps it.
        saves_input: the backward pass needs the unit's input.
        saves_output: `saved` includes the output.
        forward: the forward pass with autograd.
        backward: the backward pass, with a gradient for the unit's input.
    """

    saved: Size
    saves_input: bool
    saves_output: bool
    forward: PassCost
    backward: PassCost


@dataclass(frozen=True)
class UnitCost:
    """What one unit (or an exit: the skip connection and the head behind a unit) costs.

    Attributes:
        name: the unit's name.
        parameter_bytes: its trainable parameters.
        fixed_bytes: parameters that the model's author has frozen: they are loaded, but have no gradient, no optimizer
            state and no place in an update.
        buffer_bytes: its buffers, such as running statistics.
        largest_parameter_bytes: the largest single trainable parameter.
        input_bytes: its input, per sample.
        output_bytes: its output, per sample.
        training: one training step inside a block.
        backward_first: the backward pass of the first unit of a block, whose input needs no gradient.
        inference: a forward pass without autograd, in evaluation mode.
        flops: floating point operations of one forward pass, per sample.
        steps: what it is made of (fedepth.models.patterns); of an exit, what the head is made of. So a device splits a
            model as it was traced, without having it whole in memory to find out.
        input_shape: of one input; so a device need not run a unit to learn it.
        frozen: one step of the unit frozen and in evaluation mode, when only the gradient of its input is wanted; None
            where no block can be trained through it.
        exit: the skip connection from the unit's output and the head behind it; None where no block can end behind the
            unit. Its parameters are the head's, the same behind every unit. An exit has neither `frozen` nor `exit`.
    """

    name: str
    parameter_bytes: int
    buffer_bytes: int
    largest_parameter_bytes: int
    input_bytes: int
    output_bytes: int
    training: StepCost
    backward_first: PassCost
    inference: PassCost
    flops: int
    steps: tuple[str, ...]
    input_shape: tuple[int, ...]
    fixed_bytes: int = 0
    frozen: StepCost | None = None
    exit: UnitCost | None = None

    @property
    def loaded_bytes(self) -> int:
        """All its tensors."""
        return self.parameter_bytes + self.fixed_bytes + self.buffer_bytes


@dataclass(frozen=True)
class ModelCosts:
    """The cost table of a model.

    Attributes:
        model: the model's name.
        units: one entry per unit, in order. The last one has an exit: the head itself.
        input_bytes: one input sample as float32.
        raw_input_bytes: one input sample as stored (uint8).
        smallest_micro_batch: 2 where BatchNorm needs more than one value per channel, else 1.
        calibration: of the device that the table is used for.
    """

    model: str
    units: tuple[UnitCost, ...]
    input_bytes: int
    raw_input_bytes: int
    smallest_micro_batch: int
    calibration: Calibration = Calibration()

    @property
    def head(self) -> UnitCost:
        """What the whole model ends with.

        Raises:
            ValueError: the last unit has no exit.
        """
        found = self.units[-1].exit
        if found is None:
            raise ValueError(f"the last unit of {self.model} has no exit; every model ends with its head")
        return found


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


@dataclass(frozen=True)
class Plan:
    """The block plan of one client for one round.

    Attributes:
        stages: in the order of training; together a contiguous range of units.
        untrained: indices of units that keep their global value.
        policy: what chose it.
        budget_bytes: what it was made for.
    """

    stages: tuple[Stage, ...]
    untrained: tuple[int, ...]
    policy: Policy
    budget_bytes: int

    @property
    def predicted_peak_bytes(self) -> int:
        return max(stage.predicted_peak_bytes for stage in self.stages)

    @property
    def trained_units(self) -> tuple[int, ...]:
        """Indices of the units that are trained, in the order of training."""
        return tuple(unit for stage in self.stages for unit in range(stage.first, stage.last + 1))

    @property
    def blocks(self) -> str:
        """For people: "1-3 | 4-6 (untrained: 0)", or "0-3 | 4-6 through 7-9 (untrained: 7-9)" with a frozen suffix."""
        text = " | ".join(stage.block for stage in self.stages)
        if self.stages and self.stages[-1].frozen_suffix:
            text += f" through {_range_text(self.stages[-1].last + 1, self.untrained[-1])}"
        return text + (f" (untrained: {self.untrained_ranges})" if self.untrained else "")

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


@dataclass(frozen=True)
class Task:
    """What a client is asked to do in one round.

    Attributes:
        task_id: names this task for ever; uploads are idempotent under it.
        attempt: counts how often this task was handed to the same device.
        weights_digest: sha256 (hex) of the global weights' safetensors file.
        deadline_ms: milliseconds from now until the round may close without this update.
    """

    task_id: str
    attempt: int
    job: str
    round: int
    model: ModelSpec
    training: TrainingSpec
    policy: Policy
    costs: ModelCosts
    plan: Plan
    weights_digest: str
    weights_bytes: int
    deadline_ms: int


@dataclass(frozen=True)
class StageResult:
    """What one stage needed and did.

    Attributes:
        micro_batch: the smallest that was used; smaller than planned where memory ran short in between.
        rehearsed_peak_bytes: the same peak in the rehearsal, one optimizer step before training began; 0 where the
            stage was planned too late to be rehearsed.
        measured_peak_bytes: VmHWM of the trainer above the task's baseline, while this stage ran.
        measured_anonymous_bytes: sampled anonymous part of it, a lower bound.
        steps: optimizer steps.
        samples_seen: samples times epochs.
    """

    first: int
    last: int
    micro_batch: int
    predicted_peak_bytes: int
    rehearsed_peak_bytes: int
    measured_peak_bytes: int
    measured_anonymous_bytes: int
    budget_bytes: int
    loss_first: float
    loss_last: float
    steps: int
    samples_seen: int
    seconds: float


@dataclass(frozen=True)
class PartInfo:
    """One immutable piece of an update: a safetensors file."""

    part: int
    size_bytes: int
    digest: str


@dataclass(frozen=True)
class Result:
    """A trained update, without its tensors: those lie in the parts.

    Attributes:
        plan: the plan that was really trained (smaller than the task's if memory shrank).
        trained_units: indices of the units in the parts; the head is always among them.
        allocator: name and version of the memory allocator of the trainer.
        baseline_bytes: resident memory of the trainer before weights and data.
    """

    task_id: str
    attempt: int
    device_id: str
    round: int
    sample_count: int
    plan: Plan
    trained_units: tuple[int, ...]
    stages: tuple[StageResult, ...]
    parts: tuple[PartInfo, ...]
    seconds: float
    allocator: str
    baseline_bytes: int


class Outcome(str, Enum):
    """Why a task ended without an update."""

    DECLINED = "declined"  # no plan fits what is free now
    OVER_BUDGET = "over_budget"  # met its limit and no smaller plan fits
    TRAINER_DIED = "trainer_died"
    DATA = "data"
    MODEL_NOT_ALLOWED = "model_not_allowed"
    ERROR = "error"


@dataclass(frozen=True)
class Failure:
    """A task that ended without an update, told to the coordinator."""

    task_id: str
    attempt: int
    device_id: str
    outcome: Outcome
    message: str
    needed_bytes: int = 0
    budget_bytes: int = 0


@dataclass(frozen=True)
class Progress:
    """Where a device is in its task. Sent at least every few seconds while it works: it renews the lease."""

    task_id: str
    attempt: int
    device_id: str
    activity: str  # such as "downloading", "rehearsing", "training", "uploading"
    stage: int = 0
    stage_count: int = 0
    first: int = 0
    last: int = 0
    epoch: int = 0
    epochs: int = 0
    loss: float = 0.0
    bytes_moved: int = 0
