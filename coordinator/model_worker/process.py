"""What runs in the model worker: `python -m coordinator.model_worker.process`.

It writes {"event": "ready"}, then answers each request line with {"ok": {…}} or {"error": {"type", "message"}}, perhaps
after some {"event": "progress", "text"}, and ends with its standard input.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from coordinator.model_worker.protocol import CheckExport, Evaluate, Export
from fedepth import evaluation
from fedepth.child import run_child
from fedepth.data.rows import Rows
from fedepth.errors import DataError, FedepthError, ProtocolError
from fedepth.export.onnx import check_opset, export
from fedepth.export.samples import comparison_samples
from fedepth.files import disk_errors
from fedepth.models.load import load_model
from fedepth.models.traced import read_traced
from fedepth.preparation import Preparation
from fedepth.prepare import write_prepared

DAMAGED_SHOWN = 3

Progress = Callable[[str], None]


def evaluate(request: Evaluate, progress: Progress) -> dict[str, Any]:
    """Raises ModelError, StateError: see `load_model`. DataError: there are no test images, or too many damaged."""
    traced = read_traced(Path(request.graph))
    model = load_model(traced.graph, Path(request.weights))
    images = evaluation.open_test_images(request.test_data, request.model, traced.tokenizer)
    if isinstance(images, Rows) and images.damaged.count:
        evaluation.check_rows(images, request.most_damaged)
        shown = "; ".join(images.damaged.examples[:DAMAGED_SHOWN])
        rows = len(images) + images.damaged.count
        progress(f"{images.damaged.count} of {rows} test rows are damaged and left out, such as: {shown}")
    found = evaluation.total(evaluation.batches(model, images, request.model), len(images), request.most_damaged)
    if found.damaged:
        shown = "; ".join(found.damaged[:DAMAGED_SHOWN])
        progress(f"{len(found.damaged)} of {len(images)} test images are damaged and left out, such as: {shown}")
    return {"accuracy": found.accuracy, "loss": found.loss, "samples": found.samples}


def export_onnx(request: Export, progress: Progress) -> dict[str, Any]:
    """Raises ExportError, ModelError, StateError: see `export`."""
    traced = read_traced(Path(request.graph))
    graph = traced.graph
    samples, compared_on = comparison_samples(request.model, traced, request.test_data)
    output = Path(request.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    report = export(
        request.model,
        graph,
        Path(request.weights),
        output,
        job=request.job,
        round=request.round,
        weights_digest=request.weights_digest,
        samples=samples,
        compared_on=compared_on,
        choices=request.choices,
        tokenizer=traced.tokenizer,
    )
    return asdict(report)


def check_export(request: CheckExport, progress: Progress) -> dict[str, Any]:
    """Raises ExportError, ModelError, StateError: see `check_opset`."""
    progress(f"trying the export with opset {request.choices.opset}")
    check_opset(request.model, read_traced(Path(request.graph)).graph, Path(request.weights), request.choices)
    return {}


_ACTIONS: dict[str, tuple[Any, Callable[[Any, Progress], dict[str, Any]]]] = {
    "prepare": (Preparation, write_prepared),
    "evaluate": (Evaluate, evaluate),
    "check_export": (CheckExport, check_export),
    "export": (Export, export_onnx),
}


def answer(line: bytes, progress: Progress = lambda text: None) -> dict[str, Any]:
    """The answer to one request line. Errors that are not FedepthError end the worker, with a traceback."""
    try:
        try:
            message = msgspec.json.decode(line, type=dict[str, Any])
            do = message.pop("do", None)
            if do not in _ACTIONS:
                raise ProtocolError(f"The model worker was asked to {do!r}; it knows {', '.join(_ACTIONS)}.")
            kind, action = _ACTIONS[do]
            request = msgspec.convert(message, kind)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"The model worker got a request it cannot read: {error}.") from error
        with disk_errors(f"the model worker could not {do}", Path.cwd()):
            return {"ok": action(request, progress)}
    except FedepthError as error:
        kind = DataError if isinstance(error, DataError) else type(error)  # its kinds are of use to none but us
        return {"error": {"type": kind.__name__, "message": str(error)}}


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until there are no more."""

    def write(message: dict[str, Any]) -> None:
        answers.write(msgspec.json.encode(message) + b"\n")
        answers.flush()

    def progress(text: str) -> None:
        write({"event": "progress", "text": text})

    write({"event": "ready"})
    for line in requests:
        write(answer(line, progress))


def main() -> None:
    # The protocol keeps the real standard output; whatever a library prints goes to standard error.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    run_child(main)
