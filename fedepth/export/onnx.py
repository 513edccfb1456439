"""The trained model as an ONNX file that has been compared with the trained model, on real images where there are any.

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

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import nn

from fedepth.data.transforms import model_inputs
from fedepth.errors import ExportError
from fedepth.export.float16 import to_float16
from fedepth.export.infer import RUNTIME_ERRORS, first_line, labels_text
from fedepth.export.opset import lower, opset_of, strip
from fedepth.files import disk_errors, write_atomically
from fedepth.job_sections import ExportSection
from fedepth.layout import DTYPES as DTYPES_IN_FILES
from fedepth.models.graph import Graph
from fedepth.models.load import load_model
from fedepth.models.run import DTYPES, Model
from fedepth.models.table_input import table_features
from fedepth.models.token_ids import largest_id_of
from fedepth.printable import printable
from fedepth.task import InputType, ModelSpec

# By precision: the largest difference of an output, and that of an input's largest output. Early rounds may give logits
# of hundreds, of which float32 has no more exact ones. float16 has 11 bits, and every layer rounds.
PARITY_LIMITS = {"float32": (1e-4, 1e-5), "float16": (1e-2, 1e-2)}
COMPARED_AT_ONCE = 64
LABELS_NAME = "labels.txt"
RANDOM_SEED = 20261129
MISSING_SHARE = 0.1  # of the numbers of a table that are made up
# What torch can write: its lowest version, and those that brought operators which it cannot do without.
_OPSETS = (18, 20, 23)
_NOT_RUNNABLE: tuple[type[Exception], ...] = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    *RUNTIME_ERRORS,
)

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ExportReport:
    """An exported model, compared.

    Attributes:
        path: the ONNX file.
        labels_path: the text file with the classes, one a line.
        parity_max_abs: the largest absolute difference of an output between ONNX Runtime and torch.
        samples: inputs compared.
        compared_on: what they were, for people.
        top1_equal: inputs with the same class first in both, ties not among them.
        ties: inputs whose two best classes are too close to be ranked.
        size_bytes: of the file.
        opset: version of the default operator set.
        ir_version: of the file's format.
        precision: "float32" or "float16".
    """

    path: str
    labels_path: str
    parity_max_abs: float
    samples: int
    compared_on: str
    top1_equal: int
    ties: int
    size_bytes: int
    opset: int
    ir_version: int
    precision: str


def export(
    spec: ModelSpec,
    graph: Graph,
    weights: Path,
    output: Path,
    *,
    job: str,
    round: int,
    weights_digest: str,
    samples: npt.NDArray[Any],
    compared_on: str = "",
    choices: ExportSection = ExportSection(),  # noqa: B008 - frozen
    tokenizer: str = "",
) -> ExportReport:
    """Writes `output`, if the exported model gives what the trained one gives, and the classes beside it.

    The batch size of the exported model is free. Job, round, classes, normalisation, what goes in and comes out, and
    the digest of the weights are in the file's metadata, so that it explains itself.

    Args:
        spec: what the model is for.
        graph: the model.
        weights: a safetensors file.
        output: appears whole or not at all.
        job: the job's name.
        round: the round that gave the weights.
        weights_digest: sha256 (hex) of `weights`.
        samples: (N, *sample_shape) data to compare on, as they are stored: bytes of images, token ids, or rows.
        compared_on: what they are, for the report.
        choices: what the file is to be like.
        tokenizer: contents of the job's tokenizer file, which go into the metadata.

    Raises:
        ExportError: torch cannot export the model; an operator needs a later opset than the one asked for; an output
            differs by more than the limits of the precision (PARITY_LIMITS), or an input gets another class, ties
            excepted; or the labels of another model are in the way. The message has the figures, and `output` is as
            it was.
        ModelError: see `load_model`.
        StateError: see `load_model`.
        DiskError: `output` cannot be written.
    """
    if len(samples) == 0:
        raise ExportError(f"{spec.name}: no inputs to compare the export on. Give the job test data.")
    labels, text = output.with_name(LABELS_NAME), labels_text(spec.classes)
    _check_labels(labels, text)
    model = load_model(graph, weights)
    proto = _to_onnx(model, spec, choices)
    for key, value in _metadata(spec, job, round, weights_digest, choices, tokenizer).items():
        proto.metadata_props.add(key=key, value=value)
    try:
        onnx.checker.check_model(proto, full_check=True)
        data = proto.SerializeToString(deterministic=True)
        expected, found = compare(model, data, samples, spec, choices)
    except _NOT_RUNNABLE as error:
        raise ExportError(
            f"the ONNX export of {spec.name} with opset {opset_of(proto)} cannot be run: {first_line(error)}. Nothing "
            "was written. Try another opset, or leave opset and precision out"
        ) from error
    differences = np.abs(expected - found).max(axis=1)
    least, relative = PARITY_LIMITS[choices.precision]
    limits = np.maximum(least, relative * np.abs(expected).max(axis=1))
    best = np.sort(expected, axis=1)
    # Two outputs that each differ by no more than the limit can change places if they are this close.
    tied = best[:, -1] - best[:, -2] < 2 * limits if expected.shape[1] > 1 else np.zeros(len(samples), bool)
    equal = expected.argmax(axis=1) == found.argmax(axis=1)
    other = int((~equal & ~tied).sum())
    within = np.isfinite(differences) & (differences <= limits)
    worst = int(np.argmax(np.where(within, differences / limits, np.inf)))
    if not within.all() or other:
        what = "a logit" if choices.output == "logits" else "a probability"
        advice = (
            "If the weights are sound (finite, with logits of normal size), report this as a bug with the model's name."
            if choices.precision == "float32"
            else 'float16 does not suit this model; use precision "float32".'
        )
        raise ExportError(
            f"The ONNX export of {spec.name} differs from the trained model: by up to {differences[worst]:.3g} in "
            f"{what} (limit {limits[worst]:.1g}), and in the top class for {other} of {len(samples)} inputs. "
            f"Nothing was written. {advice}"
        )
    with disk_errors(f"{printable(str(output))} cannot be written", output.absolute().parent):
        write_atomically(labels, text.encode())
        write_atomically(output, data)
    return ExportReport(
        path=str(output),
        labels_path=str(labels),
        parity_max_abs=float(differences.max()),
        samples=len(samples),
        compared_on=compared_on or f"{len(samples)} inputs",
        top1_equal=int((equal & ~tied).sum()),
        ties=int(tied.sum()),
        size_bytes=len(data),
        opset=opset_of(proto),
        ir_version=proto.ir_version,
        precision=choices.precision,
    )


def check_opset(spec: ModelSpec, graph: Graph, weights: Path, choices: ExportSection) -> None:
    """Sees that a model can be written with the operator set of `choices`; nothing is written, and nothing compared.

    Raises:
        ExportError: an operator needs a later one, or torch cannot export the model.
        ModelError, StateError: see `load_model`.
    """
    _to_onnx(load_model(graph, weights), spec, choices)


def compare(
    model: Callable[[torch.Tensor], torch.Tensor],
    data: bytes,
    samples: npt.NDArray[Any],
    spec: ModelSpec,
    choices: ExportSection,
) -> tuple[Floats, Floats]:
    """What torch and ONNX Runtime give for the same inputs, each (N, classes).

    torch gets them as training does, so that pre-processing within the file is compared too.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    expected, found = [], []
    for start in range(0, len(samples), COMPARED_AT_ONCE):
        batch = np.ascontiguousarray(samples[start : start + COMPARED_AT_ONCE])
        inputs = model_inputs(batch, spec)
        with torch.inference_mode():
            logits = model(torch.from_numpy(inputs))
            expected.append((logits if choices.output == "logits" else logits.softmax(dim=1)).numpy())
        fed = {choices.input_name: batch if choices.preprocessing else inputs}
        found.append(session.run([choices.output_label], fed)[0])
    return np.concatenate(expected), np.concatenate(found)


def random_samples(spec: ModelSpec, graph: Graph, count: int) -> npt.NDArray[Any]:
    """Samples (count, *sample_shape) for a comparison without data, always the same: bytes with the job's mean and
    standard deviation in every channel, as far as bytes can have them, numbers of a table with theirs and some that are
    missing, or token ids that the model knows."""
    rng = np.random.default_rng(RANDOM_SEED)
    shape = (count, *spec.sample_shape)
    if spec.table is not None:
        table = spec.table
        numbers = rng.standard_normal((count, len(table.numeric))) * table.std + table.mean
        numbers[rng.random(numbers.shape) < MISSING_SHARE] = np.nan
        slots = rng.integers(0, [each.slots for each in table.categorical], (count, len(table.categorical)))
        return np.concatenate((numbers, slots), axis=1)
    if spec.text is not None:
        return rng.integers(0, spec.text.vocabulary, shape).astype(DTYPES_IN_FILES[spec.sample_type])
    if spec.input_type is InputType.TOKENS:
        ids: Bytes = rng.integers(0, min(largest_id_of(graph), 255) + 1, shape).astype(np.uint8)
        return ids
    channels = (-1, *(1,) * (len(spec.input_shape) - 1))
    mean, std = (np.asarray(values, np.float32).reshape(channels) for values in (spec.mean, spec.std))
    values = rng.standard_normal(shape, np.float32) * std + mean
    samples: Bytes = np.clip(np.rint(255 * values), 0, 255).astype(np.uint8)
    return samples


class _Whole(nn.Module):
    """A model as one module, whose weights an exporter can find, with what is asked for before and behind it."""

    def __init__(self, model: Model, spec: ModelSpec, choices: ExportSection) -> None:
        super().__init__()
        self._model = model
        self._names = {name: f"tensor_{index}" for index, name in enumerate(model.graph.tensors)}
        self._choices = choices
        for unit in (*model.units, model.head):
            for name, tensor in unit.tensors.items():
                self.register_buffer(self._names[name], tensor.detach())
        self._table = spec.table
        if spec.columns is not None:
            return
        # As `fedepth.data.transforms.normalise` computes it, rounding included.
        channels = (-1, *(1,) * (len(spec.input_shape) - 1))
        mean, std = (np.asarray(values, np.float64).reshape(channels) for values in (spec.mean, spec.std))
        self._factor = nn.Buffer(torch.from_numpy((1 / (255 * std)).astype(np.float32)))
        self._offset = nn.Buffer(torch.from_numpy((mean / std).astype(np.float32)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._choices.preprocessing and self._table is not None:
            x = table_features(x, self._table)
        elif self._choices.preprocessing:
            x = x.to(torch.float32) * self._factor - self._offset
        for unit in (*self._model.units, self._model.head):
            x = unit(x, {name: getattr(self, self._names[name]) for name in unit.unit.tensor_names})
        return x if self._choices.output == "logits" else x.softmax(dim=1)


def _to_onnx(model: Model, spec: ModelSpec, choices: ExportSection) -> Any:
    """The model as an `onnx.ModelProto`, as it is chosen to be."""
    tries = _OPSETS if choices.opset is None else (max(choices.opset, _OPSETS[0]),)
    proto = _traced(model, spec, choices, tries)
    strip(proto)
    if choices.precision == "float16":
        proto = to_float16(proto)
    for graph_value, name in (
        (proto.graph.input[0], choices.input_name),
        (proto.graph.output[0], choices.output_label),
    ):
        _rename(proto.graph, graph_value.name, name)
    lower(proto, choices.opset, spec.name)
    return proto


def _traced(model: Model, spec: ModelSpec, choices: ExportSection, opsets: tuple[int, ...]) -> Any:
    dtype, shape = DTYPES[model.graph.input_type], spec.input_shape
    if choices.preprocessing:
        dtype, shape = DTYPES[spec.sample_type], spec.sample_shape
    example = torch.zeros((2, *shape), dtype=dtype)
    with warnings.catch_warnings():
        # torch.export and onnxscript warn about each other's deprecations; nothing that a user could act on.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        for opset in opsets:
            try:
                program = torch.onnx.export(
                    _Whole(model, spec, choices).eval(),
                    (example,),
                    dynamo=True,
                    opset_version=opset,
                    dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
                    input_names=["images"],
                    output_names=["logits"],
                    verbose=False,
                )
            except torch.onnx.OnnxExporterError as error:
                if opset != opsets[-1]:
                    continue
                raise ExportError(
                    f"torch cannot export {spec.name} to ONNX with opset {opset}: {_innermost(error)}. Train on; the "
                    "weights are unharmed."
                ) from error
            assert program is not None
            return program.model_proto
    raise AssertionError("no opset to try")


def _innermost(error: BaseException) -> str:
    """What an error of the exporter goes back to, in one line: it names the operator."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _rename(graph: Any, old: str, new: str) -> None:
    """Gives a value of a graph another name; one that has it already makes way."""
    if old == new:
        return
    lists = [each for node in graph.node for each in (node.input, node.output)]
    named = [*graph.input, *graph.output, *graph.initializer, *graph.value_info]
    taken = {name for names in lists for name in names} | {each.name for each in named}
    aside = next(name for index in range(len(taken) + 1) if (name := f"{new}_{index}") not in taken)
    names = {old: new, new: aside}
    for each in lists:
        each[:] = [names.get(name, name) for name in each]
    for value in named:
        value.name = names.get(value.name, value.name)


def _check_labels(path: Path, text: str) -> None:
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        return
    if found != text.encode():
        raise ExportError(
            f"{path} has the classes of another model; give --output in a folder of its own, or remove that file"
        )


def _metadata(
    spec: ModelSpec, job: str, round: int, weights_digest: str, choices: ExportSection, tokenizer: str
) -> dict[str, str]:
    rows: dict[str, str] = {}
    if spec.text is not None:
        rows = {"text": msgspec.json.encode(spec.text).decode(), "tokenizer": tokenizer}
    elif spec.table is not None:
        rows = {"table": msgspec.json.encode(spec.table).decode()}
    return {
        **rows,
        "job": job,
        "round": str(round),
        "classes": json.dumps(spec.classes, ensure_ascii=False),
        "input_shape": json.dumps(spec.input_shape),
        "input_type": spec.input_type.value,
        "input": _input_contract(spec, choices),
        "input_name": choices.input_name,
        "output": choices.output,
        "output_name": choices.output_label,
        "preprocessing": json.dumps(choices.preprocessing),
        "precision": choices.precision,
        "mean": json.dumps(spec.mean),
        "std": json.dumps(spec.std),
        "weights_digest": weights_digest,
        "fedepth_version": version("fedepth"),
    }


def _input_contract(spec: ModelSpec, choices: ExportSection) -> str:
    """What goes into the file, in a sentence."""
    shape = f"(N, {', '.join(map(str, spec.input_shape))})"
    if spec.text is not None:
        how = "of the tokenizer in the metadata" if spec.text.tokenizer else "hashes of words"
        return f"int64 {shape}: token ids, {how}, 0 behind the last one"
    if spec.input_type is InputType.TOKENS:
        return f"int64 {shape}: token ids"
    if spec.table is not None and choices.preprocessing:
        return (
            f"float64 (N, {len(spec.table.columns)}): the columns of the metadata's table, numbers as they are, NaN "
            "where one is missing; of the others the place of the value, or the number of values"
        )
    if spec.table is not None:
        return (
            f"float32 {shape}: (value - mean) / std or 0 where it is missing, then 1 where one is missing, then a 1 in "
            "the slot of every other column's value"
        )
    what = (
        {1: "gray images", 3: "RGB images"}.get(spec.input_shape[0], "images") if len(spec.input_shape) == 3 else "data"
    )
    if choices.preprocessing:
        return f"uint8 {shape}: {what}, 0..255, not normalised"
    return f"float32 {shape}: {what}, (value / 255 - mean) / std in every channel, value in 0..255"
