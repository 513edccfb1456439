"""What training leaves on disk: the parts of an update, what their encoding has left out, and peers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from fedepth.encoding import EncodedPart, write_carried
from fedepth.errors import DivergedError
from fedepth.files import disk_errors
from fedepth.kept_files import kept_name
from fedepth.layout import Encoding, TensorInfo
from fedepth.models.run import RunnableUnit
from fedepth.task import PartInfo
from fedepth.training.block import BlockTraining
from fedepth.training.context import TrainingContext
from fedepth.training.peers import name_peer, peer_path
from fedepth.weights import Array, open_weights, write_tensors


def write_part(
    context: TrainingContext, units: Sequence[RunnableUnit], steps: int, number: int
) -> tuple[Path, PartInfo]:
    """The tensors of `units` as one more immutable part, one tensor at a time; and what it has left out, for the next
    update.

    Raises:
        DivergedError: one of them is not finite, or beyond what the encoding can hold. The loss tells of earlier steps,
            and not of what the last one did.
        DiskError: the part cannot be written.
    """
    infos = _infos(context, units)
    path = context.output / f"part-{number:04d}.safetensors"
    trained = EncodedPart(
        context.weights,
        infos,
        context.task.training.encoding,
        _finite_values(context, units, steps),
        {each.name: context.left_out[each.name] for each in infos if each.name in context.left_out},
        context.must_stay_finite,
    )
    with disk_errors("the trained blocks cannot be written", context.output):
        try:
            digest = trained.write(path)
        except OverflowError as error:
            raise DivergedError(
                f"{error}, after step {steps} at learning rate {context.task.training.learning_rate:g}; lower "
                f"training.learning_rate, or set transfer.encoding to {Encoding.FLOAT32.value}"
            ) from None
    if context.left_out_output is not None and context.task.training.encoding is Encoding.INT8:
        with disk_errors("what the encoding leaves out cannot be kept", context.left_out_output):
            _keep(context.left_out_output, number, lambda file: trained.write_left_out(file, path))
    return path, PartInfo(number, path.stat().st_size, digest)


def carry_left_out(context: TrainingContext, parts: Sequence[Path]) -> None:
    """What was left out of tensors that this update has none of waits for the next one that has.

    Raises:
        DiskError: it cannot be written.
    """
    if context.left_out_output is None or not context.left_out:
        return
    trained = {name for path in parts for name in open_weights(path).names}
    others = {name: reader for name, reader in context.left_out.items() if name not in trained}
    if others:
        with disk_errors("what the encoding leaves out cannot be kept", context.left_out_output):
            _keep(context.left_out_output, len(parts), lambda file: write_carried(file, others))


def write_peers(context: TrainingContext, block: BlockTraining) -> None:
    """The other models, each as one file.

    Raises:
        DivergedError: one of them is not finite.
        DiskError: it cannot be written.
    """
    for slot, peer in enumerate(block.peers, 1):
        if context.peers_output is not None:
            with disk_errors("a peer cannot be kept", context.peers_output):
                digest = _write_exact(context, peer.trained, block.steps, peer_path(context.peers_output, slot))
                name_peer(context.peers_output, slot, digest)
        for unit in peer.trained:
            unit.release()


def _write_exact(context: TrainingContext, units: Sequence[RunnableUnit], steps: int, path: Path) -> str:
    """What training has changed of `units`, as it is; returns the sha256 (hex) of the file."""
    values = _finite_values(context, units, steps)
    kinds = {each.name: (each.dtype, each.shape) for each in _infos(context, units)}
    return write_tensors(path, kinds, lambda name: (values(name),))


def _infos(context: TrainingContext, units: Sequence[RunnableUnit]) -> list[TensorInfo]:
    """What training has changed of `units`."""
    found = []
    for unit in units:
        for name in unit.trained():
            dtype, shape = context.weights.info(name)
            found.append(TensorInfo(name, shape, dtype, parameter=name in unit.unit.parameters))
    return found


def _finite_values(context: TrainingContext, units: Sequence[RunnableUnit], steps: int) -> Callable[[str], Array]:
    """Gives the values of a tensor that training has changed; raises DivergedError where they are not finite."""
    tensors = {name: tensor for unit in units for name, tensor in unit.trained().items()}

    def values(name: str) -> Array:
        array: Array = tensors[name].detach().cpu().contiguous().numpy()
        # The extremes of a tensor with a NaN are NaN. A map of what is finite would take a quarter of the tensor.
        extremes = (array.min(), array.max()) if array.size else ()
        if context.must_stay_finite and not all(map(math.isfinite, extremes)):
            raise DivergedError(
                f"{name} is not finite after step {steps} at learning rate {context.task.training.learning_rate:g}; "
                "lower training.learning_rate"
            )
        return array

    return values


def _keep(folder: Path, number: int, write: Callable[[Path], str]) -> None:
    """Writes a file and gives it its name, by which the device finds it."""
    path = folder / f"left-out-{number}.safetensors"
    digest = write(path)
    path.rename(folder / kept_name(number + 1, digest))
