"""From the model that a job names to what devices are handed: its graph, its costs, its first weights.

torch, and the model's own code: at the coordinator's model worker, or in a tracer, never in a trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fedepth.errors import FedepthError, ModelError
from fedepth.estimate.tracing import trace_costs
from fedepth.models import zoo
from fedepth.models.export import Exported, export_model
from fedepth.models.initial_weights import load_initial_weights
from fedepth.models.source import error_line, first_line
from fedepth.models.traced import TracedModel
from fedepth.models.verify import verify
from fedepth.program import keep_trace
from fedepth.task import ModelSpec, TrainingSpec
from fedepth.training.trial_step import try_one_step


@dataclass(frozen=True)
class PreparedModel:
    """A model as devices run it.

    Attributes:
        traced: graph and costs.
        tensors: its first weights, by name.
        notes: what a person should know.
    """

    traced: TracedModel
    tensors: Mapping[str, torch.Tensor]
    notes: tuple[str, ...]


def trace_model(spec: ModelSpec, training: TrainingSpec, *, seed: int) -> PreparedModel:
    """Builds, exports and traces a model, for trials and figures. Takes seconds.

    Args:
        seed: of its fresh weights.

    Raises:
        ModelError: it cannot be built, exported or cut.
    """
    with _in_one_sentence(spec):
        torch.manual_seed(seed)
        module = zoo.build(spec)
        exported = export_model(module, spec.name, spec.input_shape, spec.input_type.dtype, len(spec.classes))
        return _with_costs(exported, spec, training)


def prepare_model(
    spec: ModelSpec,
    training: TrainingSpec,
    *,
    seed: int,
    weights: Path | None = None,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> PreparedModel:
    """The same for a job: the graph is proved to be the model that its author wrote. Takes seconds to minutes.

    Args:
        seed: of its fresh weights.
        weights: a file with weights to begin with (fedepth.models.initial_weights).
        folder: where the module of a custom model may lie; it comes before Python's own places.
        progress: is told what is being done.

    Raises:
        ModelError: it cannot be built, exported or cut, or its graph differs from it.
    """
    classes = len(spec.classes)
    with _in_one_sentence(spec):
        progress("building the model")
        torch.manual_seed(seed)
        module = zoo.build(spec, folder)
        notes = load_initial_weights(module, weights, classes) if weights else ()
        progress("exporting it as a graph")
        exported = export_model(module, spec.name, spec.input_shape, spec.input_type.dtype, classes)
        graph = exported.graph
        progress(f"comparing {len(graph.units)} units with the model")
        verify(module, exported, spec.name)
        progress("trying one training step")
        try_one_step(graph, exported.tensors, exported.examples(max(2, graph.smallest_micro_batch)))
        progress("measuring what its units cost")
        return _with_costs(exported, spec, training, notes)


@contextmanager
def _in_one_sentence(spec: ModelSpec) -> Iterator[None]:
    """Whatever a model's own code, or torch with it, does that nobody expected. The trace is kept where a program's
    would be."""
    try:
        yield
    except (FedepthError, MemoryError):
        raise
    except Exception as error:
        where = error_line(error)
        raise ModelError(
            f"the model {spec.name} cannot be prepared{f' at {where}' if where else ''}: {type(error).__name__}: "
            f"{first_line(error)}; this error is unexpected; {keep_trace('fedepth.prepare', error)}"
        ) from error


def _with_costs(
    exported: Exported, spec: ModelSpec, training: TrainingSpec, notes: tuple[str, ...] = ()
) -> PreparedModel:
    costs = trace_costs(exported.graph, spec.name, training.batch)
    return PreparedModel(TracedModel(exported.graph, costs), exported.tensors, (*exported.graph.notes, *notes))
