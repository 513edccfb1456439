"""What turns a job's model into what devices are given: the request of a model worker and of a simulation. No torch.

`fedepth.prepare` does it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fedepth.job import fixes_statistics, model_spec, training_spec
from fedepth.job_sections import JobConfig, TuningSection
from fedepth.task import ModelSpec, TrainingSpec


@dataclass(frozen=True)
class Preparation:
    """Turn a model into a graph, prove it, write the traced model to `graph` and its first weights to `output`.

    Attributes:
        weights: a file to begin with, or empty.
        folder: where a custom model's module may lie, besides where Python looks.
        tokenizer: the job's tokenizer file, or empty.
        fixed_statistics: find out the costs of training with them as well.
        tuning: what of the model is trained.
    """

    model: ModelSpec
    training: TrainingSpec
    seed: int
    weights: str
    graph: str
    output: str
    folder: str = ""
    tokenizer: str = ""
    fixed_statistics: bool = False
    tuning: TuningSection = field(default_factory=TuningSection)


def preparation(config: JobConfig, graph: Path, output: Path) -> Preparation:
    """That of a job."""
    return Preparation(
        model=model_spec(config),
        training=training_spec(config, 1),
        seed=config.job.seed,
        weights=config.model.weights,
        graph=str(graph),
        output=str(output),
        folder=config.folder,
        tokenizer=config.tokenizer,
        fixed_statistics=fixes_statistics(config),
        tuning=config.tuning,
    )
