"""The weights of a simulation as an ONNX file, compared with torch as a coordinator's are."""

from __future__ import annotations

from pathlib import Path

from fedepth.export.onnx import ExportReport, export
from fedepth.export.samples import comparison_samples
from fedepth.job import model_spec
from fedepth.models.traced import read_traced
from fedepth.simulation.record import Record, RoundLine
from fedepth.simulation.setup import Options, job_of


def export_weights(options: Options, line: RoundLine, output: Path) -> ExportReport:
    """Exports the weights that are in force after a round of this simulation, by the job's section [export].

    Raises:
        DiskError: `output` cannot be written.
        FedepthError: see `fedepth.export.onnx.export`; there is no file then.
    """
    record = Record(options.output.resolve())
    config = job_of(options, record)
    spec = model_spec(config)
    traced = read_traced(record.folder / "graph.json")
    samples, compared_on = comparison_samples(spec, traced, config.test_data)
    return export(
        spec,
        traced.graph,
        record.weights(line.weights_round),
        output,
        job=config.job.name,
        round=line.weights_round,
        weights_digest=line.weights_digest,
        samples=samples,
        compared_on=compared_on,
        choices=config.export,
        tokenizer=traced.tokenizer,
    )
