"""The trained model as an ONNX file that has been compared with the trained model, on real images.

Runs on the CPU: other devices compute float32 less exactly, and the comparison would show that instead of a
fault of the export.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import nn

from fedepth.errors import ExportError
from fedepth.files import write_atomically
from fedepth.models.graph import Graph
from fedepth.models.load import load_model
from fedepth.models.run import DTYPES, Model
from fedepth.task import ModelSpec

PARITY_LIMIT = 1e-4
# Of an input's largest logit: early rounds may give logits of hundreds, of which float32 has no more exact ones.
RELATIVE_PARITY_LIMIT = 1e-5
COMPARED_AT_ONCE = 64
INPUT_NAME = "images"

Inputs = npt.NDArray[np.float32] | npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ExportReport:
    """An exported model, compared.

    Attributes:
        path: the ONNX file.
        parity_max_abs: the largest absolute difference of a logit between ONNX Runtime and torch.
        samples: images compared.
        top1_equal: images with the same class first in both, ties not among them.
        ties: images whose two best logits are too close to be ranked.
        size_bytes: of the file.
        opset: version of the default operator set.
    """

    path: str
    parity_max_abs: float
    samples: int
    top1_equal: int
    ties: int
    size_bytes: int
    opset: int


def export(
    spec: ModelSpec,
    graph: Graph,
    weights: Path,
    output: Path,
    *,
    job: str,
    round: int,
    weights_digest: str,
    inputs: Inputs,
) -> ExportReport:
    """Writes `output`, if the exported model gives what the trained one gives.

    The batch size of the exported model is free. Job, round, classes, normalisation and the digest of the
    weights are in the file's metadata, so that it explains itself.

    Args:
        spec: what the model is for.
        graph: the model.
        weights: a safetensors file.
        output: appears whole or not at all.
        job: the job's name.
        round: the round that gave the weights.
        weights_digest: sha256 (hex) of `weights`.
        inputs: (N, *input_shape) real inputs of the model to compare on: normalised images, or token ids.

    Raises:
        ExportError: torch cannot export the model; or a logit differs by more than 1e-4, or by more than 1e-5 of the
            input's largest; or an image gets another class, ties excepted. The message has the figures, and `output`
            is as it was.
        ModelError: see `load_model`.
        StateError: see `load_model`.
    """
    if len(inputs) == 0:
        raise ExportError(f"{spec.name}: no inputs to compare the export on. Give the job test data.")
    model = load_model(graph, weights)
    proto = _to_onnx(model, spec)
    for key, value in _metadata(spec, job, round, weights_digest).items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto, full_check=True)
    data = proto.SerializeToString(deterministic=True)
    expected, found = compare(model, data, inputs)
    differences = np.abs(expected - found).max(axis=1)
    limits = np.maximum(PARITY_LIMIT, RELATIVE_PARITY_LIMIT * np.abs(expected).max(axis=1))
    best = np.sort(expected, axis=1)
    # Two logits that each differ by no more than the limit can change places if they are this close.
    tied = best[:, -1] - best[:, -2] < 2 * limits if expected.shape[1] > 1 else np.zeros(len(inputs), bool)
    equal = expected.argmax(axis=1) == found.argmax(axis=1)
    other = int((~equal & ~tied).sum())
    within = np.isfinite(differences) & (differences <= limits)
    worst = int(np.argmax(np.where(within, differences / limits, np.inf)))
    if not within.all() or other:
        raise ExportError(
            f"The ONNX export of {spec.name} differs from the trained model: by up to {differences[worst]:.3g} in a "
            f"logit (limit {limits[worst]:.1g}), and in the top class for {other} of {len(inputs)} inputs. "
            "Nothing was written. If the weights are sound (finite, with logits of normal size), report this as a bug "
            "with the model's name."
        )
    write_atomically(output, data)
    return ExportReport(
        path=str(output),
        parity_max_abs=float(differences.max()),
        samples=len(inputs),
        top1_equal=int((equal & ~tied).sum()),
        ties=int(tied.sum()),
        size_bytes=len(data),
        opset=next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")),
    )


def compare(model: Callable[[torch.Tensor], torch.Tensor], data: bytes, inputs: Inputs) -> tuple[Floats, Floats]:
    """Logits of torch and of ONNX Runtime for the same inputs, each (N, classes)."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    expected, found = [], []
    for start in range(0, len(inputs), COMPARED_AT_ONCE):
        batch = np.ascontiguousarray(inputs[start : start + COMPARED_AT_ONCE])
        with torch.inference_mode():
            expected.append(model(torch.from_numpy(batch)).numpy())
        found.append(session.run(["logits"], {INPUT_NAME: batch})[0])
    return np.concatenate(expected), np.concatenate(found)


class _Whole(nn.Module):
    """A model as one module, whose weights an exporter can find."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._model = model
        self._names = {name: f"tensor_{index}" for index, name in enumerate(model.graph.tensors)}
        for unit in (*model.units, model.head):
            for name, tensor in unit.tensors.items():
                self.register_buffer(self._names[name], tensor.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for unit in (*self._model.units, self._model.head):
            x = unit(x, {name: getattr(self, self._names[name]) for name in unit.unit.tensor_names})
        return x


def _to_onnx(model: Model, spec: ModelSpec) -> Any:
    example = torch.zeros((2, *spec.input_shape), dtype=DTYPES[model.graph.input_type])
    with warnings.catch_warnings():
        # torch.export and onnxscript warn about each other's deprecations; nothing that a user could act on.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            program = torch.onnx.export(
                _Whole(model).eval(),
                (example,),
                dynamo=True,
                dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
                input_names=[INPUT_NAME],
                output_names=["logits"],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(
                f"torch cannot export {spec.name} to ONNX: {error}. Train on; the weights are unharmed."
            ) from error
    assert program is not None
    return program.model_proto


def _metadata(spec: ModelSpec, job: str, round: int, weights_digest: str) -> dict[str, str]:
    return {
        "job": job,
        "round": str(round),
        "classes": json.dumps(spec.classes, ensure_ascii=False),
        "input_shape": json.dumps(spec.input_shape),
        "input_type": spec.input_type.value,
        "mean": json.dumps(spec.mean),
        "std": json.dumps(spec.std),
        "weights_digest": weights_digest,
        "fedepth_version": version("fedepth"),
    }
