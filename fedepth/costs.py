"""What the units of a model cost, and what a device takes beside its tensors.

Sizes are bytes. No torch, no numpy: an idle agent loads this module.
"""

from __future__ import annotations

from dataclasses import dataclass


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
        frozen: one step of the unit frozen and in evaluation mode, when only the gradient of its input is wanted; None
            where no block can be trained through it.
        unwritten: what its kernels ask for and never write to, when it is trained.
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
    fixed_bytes: int = 0
    frozen: StepCost | None = None
    unwritten: Size = Size(0, 0)
    exit: UnitCost | None = None

    @property
    def loaded_bytes(self) -> int:
        """All its tensors."""
        return self.parameter_bytes + self.fixed_bytes + self.buffer_bytes

    @property
    def is_frozen(self) -> bool:
        """Training changes none of its tensors."""
        return self.fixed_bytes > 0 and self.parameter_bytes + self.buffer_bytes == 0


@dataclass(frozen=True)
class Calibration:
    """What a backend and its allocator take beside the tensors, as measured on one device (fedepth.estimate.fit).

    scratch = fixed + kept · what a stage that needs so much may keep (fedepth.estimate.peak)
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
class ModelCosts:
    """The cost table of a model.

    Attributes:
        model: the model's name.
        units: one entry per unit, in order. The last one has an exit: the head itself.
        input_bytes: one input sample as float32.
        raw_input_bytes: one input sample as stored (uint8).
        smallest_micro_batch: 2 where BatchNorm needs more than one value per channel, else 1.
        calibration: of the device that the table is used for.
        logits_bytes: what the head makes of one sample.
    """

    model: str
    units: tuple[UnitCost, ...]
    input_bytes: int
    raw_input_bytes: int
    smallest_micro_batch: int
    calibration: Calibration = Calibration()
    logits_bytes: int = 0

    @property
    def first_trained(self) -> int:
        """The first unit that training changes; what the model's author froze in front of it is only run."""
        return next((at for at, unit in enumerate(self.units) if not unit.is_frozen), len(self.units) - 1)

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
