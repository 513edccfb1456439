"""Unit costs of a model, and weights to try them with, by a child process.

Tracing imports sympy and torch._dynamo, hundreds of MiB that whoever wants the figures must not keep.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from fedepth.child import Child, module_argv
from fedepth.costs import ModelCosts
from fedepth.errors import ChildError, ModelError
from fedepth.estimate.tracer.protocol import TraceAnswer, TraceRequest
from fedepth.task import ModelSpec, TrainingSpec


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
        wanted = TraceRequest(
            spec, training, str(weights) if weights else "", None if allowed is None else tuple(allowed)
        )
        await self._child.send(wanted)
        answer = msgspec.convert(await self._child.receive(), TraceAnswer)
        if answer.error:
            raise ModelError(answer.error)
        if answer.costs is None:
            raise ChildError("the tracer answered neither with costs nor with an error")
        return answer.costs


@asynccontextmanager
async def tracer() -> AsyncIterator[Tracer]:
    """A tracer that is gone, with all that it has imported, at the end of the block."""
    child = await Child.start("tracer", module_argv("fedepth.estimate.tracer.process"))
    try:
        yield Tracer(child)
    finally:
        child.kill()
        await child.stop()
