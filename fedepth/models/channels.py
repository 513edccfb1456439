"""Which dimension of a unit's output holds its channels, where its operators tell.

A series (C, T) of a convolution and tokens (T, D) have the same form, and a mean over the wrong dimension of them loses
what a block has learned. So what stands in the graph comes before any guess from sizes (fedepth.models.skip).
"""

from __future__ import annotations

from collections.abc import Sequence

from fedepth.models.graph import Operation, Program, Unit, Value

_SERIES = 2  # dimensions of an output without the batch
_INPUT = 0  # the number of the value that a program is given
_TURNED = -1  # not known, and exchanged with the other dimension since
_TURNED_OVER = {None: _TURNED, _TURNED: None, 0: 1, 1: 0}
# Operators on (B, C, T), by their names without the overload.
_FIRST = {
    *("conv1d", "conv_transpose1d", "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d"),
    *("lp_pool1d", "batch_norm", "group_norm", "instance_norm", "channel_shuffle", "upsample_linear1d"),
}
# Operators on (B, T, D).
_LAST = {"linear", "embedding", "scaled_dot_product_attention", "lstm", "gru"}
# Of one dimension they are over features, which are last; of several they tell nothing.
_NORMS_OF_FEATURES = {"layer_norm", "rms_norm"}
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
    known: dict[int, int | None] = {_INPUT: before}
    for operation in program.operations:
        name = operation.name.partition(".")[0]
        given = {known.get(each.number) for each in operation.arguments if isinstance(each, Value)}
        told = _agreed(given)
        if name in _NORMS_OF_FEATURES and len(_normalized(operation)) == 1:
            told = 1
        elif name in _FIRST:
            told = 0 if told in (None, _TURNED) else told
        elif name in _LAST:
            # Over an axis that is known to be another, as the token mixing of a Mixer is, it changes nothing.
            told = 1 if told is None else told
        elif name in _TURNING and _turns(operation, _TURNING[name]):
            told = _TURNED_OVER[told]
        elif name not in _KEEPING and name not in _NORMS_OF_FEATURES:
            told = None
        known.update(dict.fromkeys(operation.results, told))
    found = known.get(program.output)
    return None if found == _TURNED else found


def _agreed(given: set[int | None]) -> int | None:
    """What the parts of a sum tell: of one that is known it is so of all; of two that differ, of none."""
    told = given - {None, _TURNED}
    if len(told) == 1:
        return told.pop()
    return _TURNED if not told and _TURNED in given else None


def _normalized(operation: Operation) -> tuple[object, ...]:
    shape = operation.arguments[1] if len(operation.arguments) > 1 else ()
    return shape if isinstance(shape, tuple) else ()


def _turns(operation: Operation, dimensions: tuple[int, ...]) -> bool:
    """Whether it exchanges the two dimensions of a series."""
    if len(dimensions) == _SERIES + 1:
        return len(operation.arguments) > 1 and operation.arguments[1] == dimensions
    given = tuple(each % 3 for each in operation.arguments[1:3] if isinstance(each, int))
    return sorted(given) == sorted(dimensions)
