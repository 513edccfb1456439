"""Checking an uploaded update against the model before anything of it is used.

The parts come from a device and may hold anything. Memory is one slice of 4 MiB and the parts' headers, which
are bounded by what this model's headers can need.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedepth.errors import StateError, UpdateError
from fedepth.layout import ModelLayout, TensorInfo
from fedepth.task import Result
from fedepth.weights import Reader, open_weights

# Per tensor: type, shape, offsets and punctuation. A name may be written in escapes of 6 bytes per character
# (12 outside the basic plane).
_ENTRY_BYTES = 512
_ESCAPE_BYTES = 12
_METADATA_BYTES = 64 << 10


def check_update(parts: Sequence[Path], layout: ModelLayout, result: Result) -> None:
    """Accepts an update whose parts hold exactly the tensors of `result.trained_units` and the head, each
    once.

    Raises:
        UpdateError: with the reason "plan" (trained units that the model does not have, or one twice), "size"
            (a part is missing or damaged), "unknown_tensor" (one that was not trained, or one twice),
            "missing_tensor", "shape", "dtype" or "not_finite".
    """
    units = result.trained_units
    if len(set(units)) != len(units) or not all(0 <= unit < len(layout.units) for unit in units):
        raise UpdateError(
            "plan", f"trained units {list(units)[:20]} of a model with the units 0 to {len(layout.units) - 1}"
        )
    expected = {tensor.name: tensor for tensor in layout.trained_tensors(units)}
    holders = _holders(parts, expected)
    missing = [name for name in expected if name not in holders]
    if missing:
        raise UpdateError(
            "missing_tensor",
            f"the update lacks {len(missing)} of {len(expected)} tensors, such as {missing[0]}",
        )
    for name, tensor in expected.items():
        _check_info(holders[name], tensor)
    for name in expected:
        _check_values(holders[name], name)


def _holders(parts: Sequence[Path], expected: dict[str, TensorInfo]) -> dict[str, Reader]:
    limit = _METADATA_BYTES + sum(_ENTRY_BYTES + _ESCAPE_BYTES * len(name) for name in expected)
    holders: dict[str, Reader] = {}
    for path in parts:
        try:
            reader = open_weights(path, limit)
        except StateError as error:
            raise UpdateError("size", str(error)) from error
        for name in reader.names:
            if name not in expected:
                raise UpdateError(
                    "unknown_tensor", f"{path.name} holds {name[:80]!r}, which is not in the trained units"
                )
            if name in holders:
                raise UpdateError(
                    "unknown_tensor", f"tensor {name} lies in {holders[name].path.name} and in {path.name}"
                )
            holders[name] = reader
    return holders


def _check_info(reader: Reader, tensor: TensorInfo) -> None:
    dtype, shape = reader.info(tensor.name)
    if dtype != tensor.dtype:
        raise UpdateError("dtype", f"tensor {tensor.name} is of type {dtype}, the model's of {tensor.dtype}")
    if shape != tensor.shape:
        raise UpdateError("shape", f"tensor {tensor.name} has the shape {shape}, the model's {tensor.shape}")


def _check_values(reader: Reader, name: str) -> None:
    if not reader.info(name)[0].startswith("F"):
        return
    try:
        for piece in reader.slices(name):
            if not np.isfinite(piece).all():
                raise UpdateError("not_finite", f"tensor {name} holds values that are no finite numbers")
    except StateError as error:
        raise UpdateError("size", str(error)) from error
