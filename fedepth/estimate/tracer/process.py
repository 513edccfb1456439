"""The tracer: a child process that traces one model after the other, `python -m fedepth.estimate.tracer.process`.

It reads one request a line from its standard input and writes one answer a line to its standard output.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from fedepth.costs import ModelCosts
from fedepth.errors import FedepthError
from fedepth.estimate.tracer.protocol import TraceAnswer, TraceRequest
from fedepth.layout import ModelLayout

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_SEED = 1


def _trace(wanted: TraceRequest) -> ModelCosts:
    from fedepth.estimate.tracing import trace_costs
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
            # What has one dimension and is neither a bias nor a mean scales something, or is its variance; counters
            # start at 0.
            yield np.full(shape, bool(shape) and not name.endswith(("bias", "mean")), dtype=np.float32)

    write_tensors(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, values)


def main() -> None:
    # The protocol keeps the real standard output; whatever a library prints goes to standard error.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            try:
                answer = TraceAnswer(costs=_trace(msgspec.json.decode(line, type=TraceRequest)))
            except FedepthError as error:
                answer = TraceAnswer(error=str(error))
            answers.write(msgspec.json.encode(answer) + b"\n")
            answers.flush()


if __name__ == "__main__":
    main()
