"""Updates as they go up: what a part holds of a tensor, and what that means. numpy, no torch.

Under float32 a part holds the new weights. Under float16 and int8 it holds, of every tensor that is worth it
(`fedepth.layout.is_encoded`), the change against the weights that the task began with, which is small and of one scale;
all other tensors are in it as they are. What a part holds of a tensor follows from its type: that of the model's own
tensor, or F16, or I8 with scales.

int8 rounds x to q · s, where q is -127 to 127 and s is the largest |x| of an output channel by 127. s has 17 bits of
mantissa at most, rounded up, so that q · s is exact in float32: whoever decodes gets the same bits, and a decoded
tensor is encoded as what it was. What rounding leaves out is at most s / 2; the device keeps it and adds it to the next
change (error feedback: Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847), so that nothing is left
out for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedepth.errors import StateError
from fedepth.layout import LARGEST_SCALE, SCALES, Encoding, TensorInfo, is_encoded, scales_shape
from fedepth.weights import Array, Reader, open_weights, write_tensors

STEPS = 127  # of a scale, to either side
LARGEST_FLOAT16 = 65504.0
SLICE_ELEMENTS = 1 << 18  # 1 MiB in float32: the trainer holds a few of them while it writes
_MANTISSA_BITS_LEFT_OUT = 7
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


def spans(count: int, elements: int = SLICE_ELEMENTS) -> Iterator[tuple[int, int]]:
    """First element and length of each slice of so many elements."""
    for first in range(0, count, elements):
        yield first, min(elements, count - first)


def scales_of(largest: Array) -> Array:
    """The scales of values whose largest are these; float32, of the same shape. Above LARGEST_SCALE they cannot be
    decoded."""
    scales: Array = np.empty_like(largest, np.float32)
    np.divide(largest, STEPS, out=scales)
    scales[scales < _SMALLEST_NORMAL] = 0.0
    bits = scales.view(np.uint32)
    left_out = np.uint32((1 << _MANTISSA_BITS_LEFT_OUT) - 1)
    bits += left_out
    bits &= ~left_out
    return scales


def quantised(values: Array, scales: Array) -> Array:
    """float32 values as int8 steps of their scales, rounded to the nearest, of halves to the even one.

    Args:
        scales: of every value; 0 where all of its channel count as 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(scales > 0, values / scales, np.float32(0))
        np.rint(steps, out=steps)
        # The nearest to a largest value may be a hair beyond, where its scale was rounded.
        return np.clip(steps, -STEPS, STEPS, out=steps).astype(np.int8)


def runs(shape: tuple[int, ...], first: int, count: int) -> tuple[int, Array]:
    """How the `count` elements from the element `first` on are spread over the scales of an int8 tensor of this shape:
    the first of these scales, and how many elements it and each that follows has."""
    if not scales_shape(shape):
        return 0, np.array([count])
    inside = math.prod(shape[1:])
    edges = np.arange(first // inside, -(-(first + count) // inside) + 1) * inside
    return first // inside, np.diff(np.clip(edges, first, first + count))


def largest_by_scale(slices: Iterable[tuple[int, Array]], shape: tuple[int, ...]) -> Array:
    """The largest absolute value that each scale has to reach, as float32 of `scales_shape`.

    Args:
        slices: first element and values of each, which is not empty.
    """
    largest = np.zeros(math.prod(scales_shape(shape)), np.float32)
    for first, values in slices:
        begin, counts = runs(shape, first, len(values))
        found = np.maximum.reduceat(np.abs(values), np.cumsum(counts) - counts)
        mine = largest[begin : begin + len(found)]
        np.maximum(mine, found, out=mine)
    return largest.reshape(scales_shape(shape))


class DecodedPart:
    """A part of an update, as tensors of the model: read as new weights, or as changes of the weights before.

    Within `with old:` those are kept open.
    """

    def __init__(self, old: Reader, path: Path) -> None:
        """Reads the part's header.

        Args:
            old: the weights that the update was trained from.

        Raises:
            StateError: it is missing or damaged, or its tensors are not those of `old`, in an encoding.
        """
        self.path = path
        self._old = old
        self._reader = reader = open_weights(path)
        known = set(old.names)
        self.names = tuple(name for name in reader.names if name in known)
        held = set(self.names)
        for name in set(reader.names) - held:
            if not name.endswith(SCALES) or name.removesuffix(SCALES) not in held:
                raise StateError(f"{path} holds a tensor {name[:80]!r} that {old.path} does not have")
        sent = {name: self._sent_as(name) for name in self.names}
        unused = {name for name in reader.names if name.endswith(SCALES) and name not in known}
        unused -= {name + SCALES for name, kind in sent.items() if kind == "I8"}
        if unused:
            raise StateError(f"{path} holds {min(unused)[:80]!r}, and the tensor is not of type I8")
        self._sent = sent

    def _sent_as(self, name: str) -> str:
        """How a tensor is encoded: F16, I8, or "" where it is in the part as it is."""
        reader, old = self._reader, self._old
        own, sent = old.info(name), reader.info(name)
        if sent == own:
            return ""
        dtype, shape = sent
        # Only parameters are ever encoded; admission knows them, and has looked.
        fits = shape == own[1] and is_encoded(own[0], shape, parameter=True)
        if fits and dtype == "F16":
            return dtype
        scales = reader.info(name + SCALES) if name + SCALES in reader.names else None
        if fits and dtype == "I8" and scales == ("F32", scales_shape(shape)):
            return dtype
        raise StateError(f"{self.path} holds {name} as {sent}, {old.path} as {own}")

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type and shape of the model's tensor."""
        return self._old.info(name)

    def read(self, name: str) -> Array:
        """The new weights, as a fresh array of the model's own type.

        Raises:
            StateError: see `fedepth.weights.Reader.read`.
        """
        if not self._sent[name]:
            return self._reader.read(name)
        values = self._old.read(name)
        flat = values.reshape(-1)
        for first, count in spans(flat.size):
            flat[first : first + count] += self.sent_change(name, first, count)
        return values

    def read_flat(self, name: str, first: int, count: int) -> Array:
        """Some of the new weights: in the model's own type, or as float64 where they are the sum of two.

        Raises:
            StateError: see `read`.
        """
        if not self._sent[name]:
            return self._reader.read_flat(name, first, count)
        return self.change(name, first, count) + self._old.read_flat(name, first, count)

    def change(self, name: str, first: int, count: int) -> Array:
        """What it adds to some of the weights before, as float64.

        Raises:
            StateError: see `read`.
        """
        if self._sent[name]:
            return self.sent_change(name, first, count).astype(np.float64)
        change = self._reader.read_flat(name, first, count).astype(np.float64)
        change -= self._old.read_flat(name, first, count)
        return change

    def sent_change(self, name: str, first: int, count: int) -> Array:
        """The change of a tensor that is encoded, as float32."""
        values = self._reader.read_flat(name, first, count).astype(np.float32)
        if self._sent[name] == "I8":
            begin, counts = runs(self._old.info(name)[1], first, count)
            values *= np.repeat(self._reader.read_flat(name + SCALES, begin, len(counts)), counts)
        return values


@dataclass(frozen=True)
class EncodedPart:
    """What training has made of some tensors, to be written as a part.

    Attributes:
        old: the weights that it began with.
        tensors: what there is.
        values: gives the new values of a tensor, of the model's own type and shape.
        left_out: of tensors with a residual, the file that holds it, under their names, as float32.
        checked: what cannot be encoded is an error. A rehearsal trains on too little to judge by.
    """

    old: Reader
    tensors: Sequence[TensorInfo]
    encoding: Encoding
    values: Callable[[str], Array]
    left_out: Mapping[str, Reader]
    checked: bool = True

    def write(self, path: Path) -> str:
        """Writes the part as it goes up; returns its sha256 (hex). Memory is one tensor and a few slices of 1 MiB.

        Raises:
            OverflowError: a change is beyond what the encoding can hold. Nothing is written.
        """
        sent = {each.name: tensor for tensor in self.tensors for each in tensor.as_sent(self.encoding)}
        infos = {each.name: each for tensor in self.tensors for each in tensor.as_sent(self.encoding)}
        scales: dict[str, Array] = {}  # they lie before the tensors in the file, since their elements are larger

        def pieces(name: str) -> Iterator[Array]:
            tensor = sent[name]
            if infos[name] == tensor:
                yield self.values(name)
            elif name != tensor.name:
                scales[tensor.name] = self._scales(tensor)
                yield scales[tensor.name]
            elif self.encoding is Encoding.FLOAT16:
                yield from map(self._as_float16, (values for _, values in self._changes(tensor)))
            else:
                for first, values in self._changes(tensor):
                    begin, counts = runs(tensor.shape, first, len(values))
                    flat = scales[tensor.name].reshape(-1)
                    yield quantised(values, np.repeat(flat[begin : begin + len(counts)], counts))

        kinds = {name: (each.dtype, each.shape) for name, each in infos.items()}
        with np.errstate(over="ignore", invalid="ignore"):
            return write_tensors(path, kinds, pieces)

    def write_left_out(self, path: Path, part: Path) -> str:
        """Writes what a part of these tensors has left out of them; returns the sha256 (hex) of the file."""
        sent = DecodedPart(self.old, part)
        infos = {tensor.name: tensor for tensor in self.tensors if tensor.as_sent(self.encoding) != (tensor,)}

        def pieces(name: str) -> Iterator[Array]:
            for first, values in self._changes(infos[name]):
                yield values - sent.sent_change(name, first, len(values))

        kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in infos.items()}
        with np.errstate(over="ignore", invalid="ignore"):
            return write_tensors(path, kinds, pieces)

    def _changes(self, tensor: TensorInfo) -> Iterator[tuple[int, Array]]:
        """The change of a tensor with what was left out before, in float32 slices."""
        name, values = tensor.name, self.values(tensor.name).reshape(-1)
        for first, count in spans(values.size):
            change = values[first : first + count] - self.old.read_flat(name, first, count)
            if name in self.left_out:
                change += self.left_out[name].read_flat(name, first, count)
            yield first, change

    def _scales(self, tensor: TensorInfo) -> Array:
        largest = largest_by_scale(self._changes(tensor), tensor.shape)
        scales = scales_of(largest)
        if self.checked and not float(scales.max()) <= LARGEST_SCALE:
            raise OverflowError(f"{tensor.name} changes by {float(largest.max()):g}, more than int8 can hold")
        return scales

    def _as_float16(self, change: Array) -> Array:
        largest = float(np.abs(change).max())
        if self.checked and not largest <= LARGEST_FLOAT16:
            raise OverflowError(f"a weight changes by {largest:g}, more than float16 can hold ({LARGEST_FLOAT16:g})")
        return change.astype(np.float16)


def write_carried(path: Path, left_out: Mapping[str, Reader]) -> str:
    """Writes what was left out before of tensors that this update has none of; returns the sha256 (hex)."""
    infos = {name: reader.info(name) for name, reader in left_out.items()}
    return write_tensors(path, infos, lambda name: left_out[name].slices(name, 4 * SLICE_ELEMENTS))
