"""From the model that a job names to what devices are handed: its graph, its costs, its first weights.

torch, and the model's own code: at the coordinator's model worker, or in a tracer, never in a trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from msgspec import structs

from fedepth.costs import ModelCosts
from fedepth.data.text import read_tokenizer
from fedepth.errors import FedepthError, ModelError
from fedepth.estimate.tracing import trace_costs
from fedepth.files import file_digest
from fedepth.job import check_training
from fedepth.job_sections import TuningSection
from fedepth.models import zoo
from fedepth.models.auxiliary import with_auxiliary
from fedepth.models.export import Exported, export_model
from fedepth.models.fixed_statistics import has_statistics, with_fixed_statistics
from fedepth.models.graph import Graph
from fedepth.models.initial_weights import load_initial_weights
from fedepth.models.source import error_line, first_line
from fedepth.models.token_ids import largest_row
from fedepth.models.traced import TracedModel, write_traced
from fedepth.models.tuning import described, tuned
from fedepth.models.verify import verify
from fedepth.preparation import Preparation
from fedepth.program import keep_trace
from fedepth.task import Heads, ModelSpec, TrainingSpec
from fedepth.training.trial_step import try_one_step
from fedepth.weights import save

_ALL = TuningSection()  # everything is trained


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


def trace_model(
    spec: ModelSpec,
    training: TrainingSpec,
    *,
    seed: int,
    width: Fraction = Fraction(1),
    folder: Path | None = None,
    tuning: TuningSection = _ALL,
) -> PreparedModel:
    """Builds, exports and traces a model, for trials and figures. Takes seconds.

    Args:
        seed: of its fresh weights.
        width: how many times as many channels as it has; other than 1 for some models of the zoo only.
        folder: where the module of a custom model may lie; it comes before Python's own places.
        tuning: what of the model is trained.

    Raises:
        ModelError: it cannot be built, exported or cut.
    """
    with _in_one_sentence(spec):
        torch.manual_seed(seed)
        module = zoo.build(spec, folder) if width == 1 else zoo.build_width(spec, width)
        exported = export_model(module, spec.name, spec.input_shape, spec.input_type.dtype, len(spec.classes))
        exported = replace(exported, graph=tuned(exported.graph, tuning, spec.name))
        exported = _with_heads(exported, spec, training, seed)
        return _with_costs(exported, exported.graph, spec, training, fixed_statistics=training.fixed_statistics)


def prepare_model(
    spec: ModelSpec,
    training: TrainingSpec,
    *,
    seed: int,
    weights: Path | None = None,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
    fixed_statistics: bool = False,
    tuning: TuningSection = _ALL,
) -> PreparedModel:
    """The same for a job: the graph is proved to be the model that its author wrote. Takes seconds to minutes.

    Args:
        seed: of its fresh weights.
        weights: a file with weights to begin with (fedepth.models.initial_weights).
        folder: where the module of a custom model may lie; it comes before Python's own places.
        progress: is told what is being done.
        fixed_statistics: also find out what units cost with fixed BatchNorm statistics.
        tuning: what of the model is trained.

    Raises:
        ConfigError: `training` holds what no job file may.
        ModelError: it cannot be built, exported or cut, its graph differs from it, or the file or `tuning` do not fit.
    """
    check_training(training)
    classes = len(spec.classes)
    with _in_one_sentence(spec):
        progress("building the model")
        torch.manual_seed(seed)
        module = zoo.build(spec, folder)
        notes: tuple[str, ...] = ()
        if weights:
            notes = load_initial_weights(module, weights, classes, new_classifier=tuning.new_classifier)
        progress("exporting it as a graph")
        exported = export_model(module, spec.name, spec.input_shape, spec.input_type.dtype, classes)
        graph = tuned(exported.graph, tuning, spec.name)
        check_vocabulary(graph, spec)
        progress(f"comparing {len(graph.units)} units with the model")
        verify(module, exported, spec.name)
        about_tuning = described(graph, exported.graph)
        exported = _with_heads(replace(exported, graph=graph), spec, training, seed)
        graph = exported.graph
        progress("trying one training step")
        samples = exported.examples(max(2, graph.smallest_micro_batch))
        try_one_step(graph, exported.tensors, samples)
        if fixed_statistics:
            if has_statistics(graph):
                try_one_step(with_fixed_statistics(graph), exported.tensors, samples)
            else:
                notes += ("[training] batch_norm changes nothing: no trained unit has a BatchNorm with statistics",)
        progress("measuring what its units cost")
        prepared = _with_costs(exported, graph, spec, training, fixed_statistics=fixed_statistics)
        return replace(prepared, notes=(*prepared.notes, *notes, *([about_tuning] if about_tuning else [])))


def check_vocabulary(graph: Graph, spec: ModelSpec) -> None:
    """A device would fail at the first word whose id is too large, and one without such words would not.

    Raises:
        ModelError: the model has no row for some ids that the job's texts have.
    """
    rows = largest_row(graph)
    if spec.text is not None and rows is not None and rows + 1 < spec.text.vocabulary:
        smaller = "give a tokenizer with ids up" if spec.text.tokenizer else "set [text] vocabulary"
        raise ModelError(
            f"the model {spec.name} has a table with {rows + 1} rows for token ids, and the job's texts have ids below "
            f"{spec.text.vocabulary}; {smaller} to {rows + 1}, or make the table as large"
        )


def write_prepared(asked: Preparation, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Prepares a job's model and writes its files.

    Returns:
        "layout" (ModelLayout), "notes", "digest" and "size_bytes" of the weights, "graph_digest" and "graph_bytes".

    Raises:
        ModelError: see `prepare_model`.
        ConfigError: the tokenizer is not one.
    """
    prepared = prepare_model(
        asked.model,
        asked.training,
        seed=asked.seed,
        weights=Path(asked.weights) if asked.weights else None,
        folder=Path(asked.folder) if asked.folder else None,
        progress=progress,
        fixed_statistics=asked.fixed_statistics,
        tuning=asked.tuning,
    )
    output, graph = Path(asked.output), Path(asked.graph)
    for path in (output, graph):
        path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = read_tokenizer(Path(asked.tokenizer)) if asked.tokenizer else ""
    write_traced(graph, structs.replace(prepared.traced, tokenizer=tokenizer))
    digest = save(output, {name: tensor.detach().numpy() for name, tensor in prepared.tensors.items()})
    return {
        "layout": prepared.traced.graph.layout(),
        "notes": prepared.notes,
        "digest": digest,
        "size_bytes": output.stat().st_size,
        "graph_digest": file_digest(graph),
        "graph_bytes": graph.stat().st_size,
    }


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


def _with_heads(exported: Exported, spec: ModelSpec, training: TrainingSpec, seed: int) -> Exported:
    """With the auxiliary heads that a job may ask for."""
    if training.heads is Heads.SHARED:
        return exported
    return with_auxiliary(exported, len(spec.classes), seed=seed)


def _with_costs(
    exported: Exported, graph: Graph, spec: ModelSpec, training: TrainingSpec, *, fixed_statistics: bool
) -> PreparedModel:
    """`graph`: what is trained of the one that was exported."""

    def costs(of: Graph) -> ModelCosts:
        return replace(trace_costs(of, spec.name, training.batch), raw_input_bytes=spec.sample_bytes)

    fixed = with_fixed_statistics(graph) if fixed_statistics else graph
    fixed_costs = costs(fixed) if fixed is not graph else None
    return PreparedModel(TracedModel(graph, costs(graph), fixed_costs), exported.tensors, graph.notes)
