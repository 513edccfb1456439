"""What runs in the model worker: `python -m coordinator.model_worker.process`.

It writes {"event": "ready"}, then answers each request line with {"ok": {…}} or {"error": {"type", "message"}}, perhaps
after some {"event": "progress", "text"}, and ends with its standard input. While it works it writes {"event": "alive"}
every few seconds: whoever hears nothing for long may take it for stuck.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from coordinator.model_worker.protocol import ALIVE_S, Evaluate, Export, Prepare
from fedepth.child import run_child
from fedepth.data.damage import check_share
from fedepth.data.read import Images, open_images, read_sound
from fedepth.data.rows import Rows, damaged_only
from fedepth.data.text import read_tokenizer
from fedepth.data.transforms import model_inputs
from fedepth.errors import DataError, FedepthError, ProtocolError
from fedepth.export.onnx import export, random_samples
from fedepth.files import disk_errors, file_digest
from fedepth.models.graph import Graph
from fedepth.models.load import load_model
from fedepth.models.traced import read_traced, write_traced
from fedepth.prepare import prepare_model
from fedepth.task import ModelSpec
from fedepth.weights import save

# One batch of input images; at 224 px 27 of them, at 32 px the 256 that are enough for any speed.
BATCH_BYTES = 16 << 20
LARGEST_BATCH = 256
EXPORT_SAMPLES = 256
DAMAGED_SHOWN = 3

Progress = Callable[[str], None]


def prepare(request: Prepare, progress: Progress) -> dict[str, Any]:
    """Raises ModelError: see `prepare_model`."""
    weights = Path(request.weights) if request.weights else None
    folder = Path(request.folder) if request.folder else None
    prepared = prepare_model(
        request.model, request.training, seed=request.seed, weights=weights, folder=folder, progress=progress
    )
    output, graph = Path(request.output), Path(request.graph)
    for path in (output, graph):
        path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = read_tokenizer(Path(request.tokenizer)) if request.tokenizer else ""
    write_traced(graph, msgspec.structs.replace(prepared.traced, tokenizer=tokenizer))
    digest = save(output, {name: tensor.detach().numpy() for name, tensor in prepared.tensors.items()})
    return {
        "layout": prepared.traced.graph.layout(),
        "notes": prepared.notes,
        "digest": digest,
        "size_bytes": output.stat().st_size,
        "graph_digest": file_digest(graph),
        "graph_bytes": graph.stat().st_size,
    }


def evaluate(request: Evaluate, progress: Progress) -> dict[str, Any]:
    """Raises ModelError, StateError: see `load_model`. DataError: there are no test images, or too many damaged."""
    traced = read_traced(Path(request.graph))
    model = load_model(traced.graph, Path(request.weights))
    images = _test_images(request.test_data, request.model, traced.tokenizer)
    if isinstance(images, Rows):
        _check_rows(images, request.most_damaged, progress)
    correct, loss, samples = 0, 0.0, 0
    damaged: dict[int, str] = {}
    batch = max(1, min(LARGEST_BATCH, BATCH_BYTES // (4 * int(np.prod(request.model.input_shape)))))
    for start in range(0, len(images), batch):
        indices = np.arange(start, min(start + batch, len(images)))
        pixels, sound, errors = read_sound(images, indices)
        damaged.update((len(damaged) + number, str(error)) for number, error in enumerate(errors))
        samples += len(sound)
        check_share(len(images) - len(damaged), len(damaged), request.most_damaged, damaged, "[test] most_damaged")
        if not len(sound):
            continue
        with torch.inference_mode():
            logits = model(torch.from_numpy(model_inputs(pixels, request.model)))
            labels = torch.from_numpy(images.labels[sound])
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            correct += int((logits.argmax(dim=1) == labels).sum())
    if damaged:
        shown = "; ".join([*damaged.values()][:DAMAGED_SHOWN])
        progress(f"{len(damaged)} of {len(images)} test images are damaged and left out, such as: {shown}")
    return {"accuracy": correct / samples, "loss": loss / samples, "samples": samples}


def export_onnx(request: Export, progress: Progress) -> dict[str, Any]:
    """Raises ExportError, ModelError, StateError: see `export`."""
    traced = read_traced(Path(request.graph))
    graph = traced.graph
    samples, compared_on = comparison_samples(request, graph, traced.tokenizer)
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


def comparison_samples(request: Export, graph: Graph, tokenizer: str = "") -> tuple[npt.NDArray[Any], str]:
    """What an export is compared on, and what that is, for people."""
    why = "the job has no test data"
    if request.test_data:
        try:
            images = _test_images(request.test_data, request.model, tokenizer)
            chosen = np.linspace(0, len(images) - 1, min(EXPORT_SAMPLES, len(images))).astype(np.int64)
            pixels, sound, errors = read_sound(images, chosen)
            if not len(sound):
                raise errors[0]
            return pixels, f"{len(sound)} samples of the test data"
        except (DataError, OSError) as error:
            why = f"the test data cannot be read: {error}"
    return random_samples(request.model, graph, EXPORT_SAMPLES), f"{EXPORT_SAMPLES} random inputs, since {why}"


def _test_images(test_data: str, spec: ModelSpec, tokenizer: str) -> Images:
    source = test_data if test_data == "digits" else Path(test_data)
    images = open_images(source, spec, "test", tokenizer=tokenizer)
    if len(images) == 0:
        what = damaged_only(images) if isinstance(images, Rows) else ""
        raise DataError(f"{test_data} holds no test samples{what}. Give the job test data, or leave it out.")
    return images


def _check_rows(rows: Rows, most: float, progress: Progress) -> None:
    """Raises DataError if too many rows are damaged; tells of those that are."""
    found = rows.damaged
    check_share(len(rows), found.count, most, found.messages, "[test] most_damaged", "rows")
    if found.count:
        shown = "; ".join(found.examples[:DAMAGED_SHOWN])
        progress(f"{found.count} of {len(rows) + found.count} test rows are damaged and left out, such as: {shown}")


_ACTIONS: dict[str, tuple[Any, Callable[[Any, Progress], dict[str, Any]]]] = {
    "prepare": (Prepare, prepare),
    "evaluate": (Evaluate, evaluate),
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


def serve(requests: BinaryIO, answers: BinaryIO, alive_s: float = ALIVE_S) -> None:
    """Answers requests until there are no more."""
    one_writer = threading.Lock()

    def write(message: dict[str, Any]) -> None:
        with one_writer:
            answers.write(msgspec.json.encode(message) + b"\n")
            answers.flush()

    def progress(text: str) -> None:
        write({"event": "progress", "text": text})

    write({"event": "ready"})
    for line in requests:
        with _signs_of_life(write, alive_s):
            answered = answer(line, progress)
        write(answered)


@contextlib.contextmanager
def _signs_of_life(write: Callable[[dict[str, Any]], None], alive_s: float) -> Iterator[None]:
    """Says every `alive_s` that this process still runs. What works within the block lets other threads run."""
    done = threading.Event()

    def beat() -> None:
        with contextlib.suppress(OSError):  # nobody listens any more: the answer will find out
            while not done.wait(alive_s):
                write({"event": "alive"})

    thread = threading.Thread(target=beat, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def main() -> None:
    # The protocol keeps the real standard output; whatever a library prints goes to standard error.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    run_child(main)
