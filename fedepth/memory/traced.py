"""Unit costs and initial weights of a model, by a child process: `python -m fedepth.memory.traced`.

Tracing imports sympy and torch._dynamo, hundreds of MiB that whoever wants the figures must not keep. A request is one
line of JSON on standard input, {"model", "training", "seed", "weights", "allowed"}, its answer one on standard output.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from fedepth.child import Child, module_argv
from fedepth.errors import ChildError, FedepthError, ModelError
from fedepth.task import ModelCosts, ModelSpec, TrainingSpec


class Wanted(msgspec.Struct, frozen=True):
    """What to trace. `weights`: where initial weights go; nowhere if empty. `allowed`: see `zoo.build`."""

    model: ModelSpec
    training: TrainingSpec
    seed: int
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
        seed: int = 1,
    ) -> ModelCosts:
        """The cost table; initial weights go to `weights`. Takes seconds.

        Raises:
            ModelError: the model cannot be built or split, or is not among `allowed`.
            ChildError: the child ended without an answer.
        """
        wanted = Wanted(
            spec, training, seed, str(weights) if weights else "", None if allowed is None else tuple(allowed)
        )
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
    import torch

    from fedepth.memory.trace import trace_costs
    from fedepth.models.split import split_spec
    from fedepth.weights import save

    if wanted.weights:
        torch.manual_seed(wanted.seed)
        model = split_spec(wanted.model, wanted.allowed, device="cpu").model
        save(Path(wanted.weights), {name: tensor.numpy() for name, tensor in model.state_dict().items()})
        del model
    return trace_costs(wanted.model, wanted.training, wanted.allowed)


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
