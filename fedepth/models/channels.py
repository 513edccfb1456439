"""Which dimension of a unit's output holds its channels, where its operators tell.

A series (C, T) of a convolution and tokens (T, D) have the same form, and a mean over the wrong dimension of them loses
what a block has learned. So what stands in the graph comes before any guess from sizes (fedepth.models.skip).
"""

from __future__ import annotations

from collections.abc import Sequence

from fedepth.models.graph import Operation, Program, Unit, Value

_SERIES = 2  # dimensions of an output without the batch
_INPUT = 0  # the number of the value that a program is given
# Operators on (B, C, T), by their names without the overload.
_FIRST = {
    *("conv1d", "conv_transpose1d", "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d"),
    *("lp_pool1d", "batch_norm", "group_norm", "instance_norm", "channel_shuffle", "upsample_linear1d"),
}
# Operators on (B, T, D).
_LAST = {"linear", "layer_norm", "rms_norm", "embedding", "scaled_dot_product_attention", "lstm", "gru"}
# Operators that leave every dimension where it is, so that what comes before them tells.
_KEEPING = {
    *("relu", "relu_", "gelu", "silu", "silu_", "mish", "elu", "elu_", "selu", "celu", "leaky_relu", "leaky_relu_"),
    *("relu6", "hardtanh", "hardtanh_", "hardswish", "hardswish_", "hardsigmoid", "prelu", "softplus", "tanh"),
    *("sigmoid", "dropout", "dropout_", "feature_dropout", "alpha_dropout", "add", "add_", "sub", "mul", "mul_", "div"),
    *("clone", "contiguous", "to", "detach", "alias", "abs", "sqrt", "exp", "pow", "clamp", "clamp_min", "neg", "sin"),
}
_TURNING = {"permute": (0, 2, 1), "transpose": (1, 2), "swapaxes": (1, 2), "swapdims": (1, 2)}


def channels_of(units: Sequence[Unit]) -> tuple[int | None, ...]:
    """For every unit of a model the dimension of its output, without the batch, that holds its channels; None where
    nothing tells.

    It is told of series and tokens only: the other forms tell it by themselves.
    """
    found: list[int | None] = []
    for unit in units:
        before = found[-1] if found and len(unit.input_shape) == _SERIES else None
        found.append(_channels(unit.evaluation, before))
    return tuple(found)


def _channels(program: Program, before: int | None) -> int | None:
    """The same of one program, whose input has its channels in the dimension `before`."""
    # What is known of a value comes after what it is made of: a walk back would meet the same ones again and again.
    known: dict[int, int | None] = {_INPUT: before}
    for operation in program.operations:
        name = operation.name.partition(".")[0]
        told: int | None = None
        if name in _FIRST or name in _LAST:
            told = int(name in _LAST)
        elif name in _KEEPING or name in _TURNING:
            given = (known.get(each.number) for each in operation.arguments if isinstance(each, Value))
            told = next((each for each in given if each is not None), None)  # of a sum any part tells
            if name in _TURNING and told is not None:
                told = 1 - told if _turns(operation, _TURNING[name]) else None
        known.update(dict.fromkeys(operation.results, told))
    return known.get(program.output)


def _turns(operation: Operation, dimensions: tuple[int, ...]) -> bool:
    """Whether it exchanges the two dimensions of a series."""
    if len(dimensions) == _SERIES + 1:
        return len(operation.arguments) > 1 and operation.arguments[1] == dimensions
    given = tuple(each % 3 for each in operation.arguments[1:3] if isinstance(each, int))
    return sorted(given) == sorted(dimensions)
