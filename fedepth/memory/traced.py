"""Unit costs of a model, and weights to try them with, by a child process: `python -m fedepth.memory.traced`.

Tracing imports sympy and torch._dynamo, hundreds of MiB that whoever wants the figures must not keep. A request is one
line of JSON on standard input, {"model", "training", "weights", "allowed"}, its answer one on standard output.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from fedepth.child import Child, module_argv
from fedepth.costs import ModelCosts
from fedepth.errors import ChildError, FedepthError, ModelError
from fedepth.layout import ModelLayout
from fedepth.task import ModelSpec, TrainingSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_SEED = 1


class Wanted(msgspec.Struct, frozen=True):
    """What to trace. `weights`: where weights go; nowhere if empty. `allowed`: see `zoo.build`."""

    model: ModelSpec
    training: TrainingSpec
    weights: str
    allowed: tuple[str, ...] | None


class _Answer(msgspec.Struct, frozen=True):
    costs: ModelCosts | None = None
    error: str = ""


class Tracer:
    """A child that traces one model after the other."""

    def __init__(self, child: Child) -> None:
        self._child = child

    async def costs(
        self,
        spec: ModelSpec,
        training: TrainingSpec,
        weights: Path | None,
        allowed: Sequence[str] | None,
    ) -> ModelCosts:
        """The cost table; random weights that can be trained go to `weights`. Takes seconds.

        Raises:
            ModelError: the model cannot be built or split, or is not among `allowed`.
            ChildError: the child ended without an answer.
        """
        wanted = Wanted(spec, training, str(weights) if weights else "", None if allowed is None else tuple(allowed))
        await self._child.send(wanted)
        answer = msgspec.convert(await self._child.receive(), _Answer)
        if answer.error:
            raise ModelError(answer.error)
        if answer.costs is None:
            raise ChildError("the tracer answered neither with costs nor with an error")
        return answer.costs


@asynccontextmanager
async def tracer() -> AsyncIterator[Tracer]:
    """A tracer that is gone, with all that it has imported, at the end of the block."""
    child = await Child.start("tracer", module_argv("fedepth.memory.traced"))
    try:
        yield Tracer(child)
    finally:
        child.kill()
        await child.stop()


def _trace(wanted: Wanted) -> ModelCosts:
    from fedepth.memory.trace import trace_costs
    from fedepth.models.split import split_spec

    costs = trace_costs(wanted.model, wanted.training, wanted.allowed)
    if wanted.weights:
        _write_random(Path(wanted.weights), split_spec(wanted.model, wanted.allowed, costs=costs).layout())
    return costs


def _write_random(path: Path, layout: ModelLayout) -> None:
    """Weights about as large as a fresh model's, one tensor at a time: the whole of them need not fit into memory."""
    import numpy as np

    from fedepth.weights import write_tensors

    tensors = layout.by_name
    rng = np.random.default_rng(_SEED)

    def values(name: str) -> Iterator[npt.NDArray[np.float32]]:
        shape = tensors[name].shape
        if len(shape) > 1:
            yield rng.standard_normal(shape, dtype=np.float32) * np.float32(math.prod(shape[1:]) ** -0.5)
        else:
            # What has one dimension and is no bias or mean scales something, or is its variance; counters start at 0.
            yield np.full(shape, bool(shape) and not name.endswith(("bias", "mean")), dtype=np.float32)

    write_tensors(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, values)


def main() -> None:
    # The protocol keeps the real standard output; whatever a library prints goes to standard error.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            try:
                answer = _Answer(costs=_trace(msgspec.json.decode(line, type=Wanted)))
            except FedepthError as error:
                answer = _Answer(error=str(error))
            answers.write(msgspec.json.encode(answer) + b"\n")
            answers.flush()


if __name__ == "__main__":
    main()
