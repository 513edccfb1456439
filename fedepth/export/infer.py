"""What an exported model says of images or of the rows of files. Needs onnxruntime, numpy and Pillow; no torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from fedepth.data.damage import RowError
from fedepth.data.decode import decode_image
from fedepth.data.folders import IMAGE_SUFFIXES, LeftOut, gathered, hidden, is_folder, not_an_image
from fedepth.data.records import read_records
from fedepth.data.row_files import SUFFIXES, no_row_files
from fedepth.data.row_files import row_files as files_with_rows
from fedepth.data.rows import sample_encoder
from fedepth.data.transforms import model_inputs
from fedepth.errors import DataError, ModelError
from fedepth.files import read_regular
from fedepth.printable import quoted, shortened
from fedepth.task import InputType, ModelSpec, TableSpec, TextSpec

MOST_BYTES = (1 << 31) - 1  # of an ONNX file without data outside it, as protobuf has it
AT_ONCE = 32
_REASONS_SHOWN = 10
# What ONNX Runtime raises; there is no base class of their own.
RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    state.EPFail,
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
)
# Characters that end a line (str.splitlines), and the one that they are written with.
_LINE_ENDS = str.maketrans(
    {each: each.encode("unicode_escape").decode() for each in "\\\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}
)


_Read = tuple[Path, int, npt.NDArray[Any] | str]  # a file, the line in it, and a sample or what is wrong with it


@dataclass(frozen=True)
class Deployed:
    """An exported model that is ready to run.

    Attributes:
        path: the ONNX file.
        spec: classes, input and normalisation, as the file's metadata say.
        job: the job that trained it.
        round: the round that gave its weights.
        preprocessing: it normalises its input itself.
        probabilities: it gives probabilities, and not logits.
        tokenizer: contents of the tokenizer file of its job; empty where it had none.
    """

    path: Path
    session: Any
    spec: ModelSpec
    job: str
    round: str
    input_name: str
    output_name: str
    preprocessing: bool
    probabilities: bool
    tokenizer: str = ""


@dataclass(frozen=True)
class Prediction:
    """What a model says of a file: the likeliest classes with their probabilities; or why it says nothing.

    Attributes:
        line: where a row begins; 0 for a file that is one sample.
    """

    file: Path
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ""
    line: int = 0


def labels_text(classes: Sequence[str]) -> str:
    """The classes in label order, one a line; what ends a line, and the backslash, as in Python (`\\n`, `\\\\`)."""
    return "".join(name.translate(_LINE_ENDS) + "\n" for name in classes)


def first_line(error: BaseException) -> str:
    """What a library says of a failure, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(lines[0].rstrip(".") if lines else type(error).__name__)


def open_deployed(path: Path) -> Deployed:
    """Opens a file that `fedepth-coordinator export` or a job wrote.

    Raises:
        ModelError: it is missing, damaged, too new for the ONNX Runtime that is installed, or not from fedepth.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        data = read_regular(path, MOST_BYTES)
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except RUNTIME_ERRORS as error:
        raise ModelError(
            f"{path} cannot be loaded by ONNX Runtime {onnxruntime.__version__}: {first_line(error)}; it is damaged, "
            "not an ONNX file, or written for a newer runtime: export it again, with a lower opset if need be"
        ) from None
    told = session.get_modelmeta().custom_metadata_map
    missing = [key for key in ("job", "classes", "input_shape", "mean", "std") if key not in told]
    if missing:
        raise ModelError(
            f"{path} is not a model that fedepth exported: its metadata have no {missing[0]}; infer needs a file of "
            "fedepth-coordinator export"
        )
    try:
        spec = ModelSpec(
            name=path.name,
            classes=msgspec.json.decode(told["classes"], type=tuple[str, ...]),
            input_shape=msgspec.json.decode(told["input_shape"], type=tuple[int, ...]),
            mean=msgspec.json.decode(told["mean"], type=tuple[float, ...]),
            std=msgspec.json.decode(told["std"], type=tuple[float, ...]),
            input_type=InputType(told.get("input_type", "float")),
            text=msgspec.json.decode(told["text"], type=TextSpec) if "text" in told else None,
            table=msgspec.json.decode(told["table"], type=TableSpec) if "table" in told else None,
        )
        preprocessing = msgspec.json.decode(told.get("preprocessing", "false"), type=bool)
    except (ValueError, msgspec.MsgspecError) as error:
        raise ModelError(f"{path}: its metadata cannot be read: {first_line(error)}; export it again") from None
    if len(session.get_outputs()) != 1 or len(session.get_inputs()) != 1:
        raise ModelError(
            f"{path} has {len(session.get_inputs())} inputs and {len(session.get_outputs())} outputs, an export of "
            "fedepth has one of each: it was changed after the export; export it again"
        )
    if not _can_be_normalised(spec):
        raise ModelError(f"{path}: its metadata have no mean and std for each channel; export it again")
    shape = spec.sample_shape if preprocessing else spec.input_shape
    (given,), (taken,) = session.get_outputs(), session.get_inputs()
    if list(given.shape[1:]) != [len(spec.classes)] or tuple(taken.shape[1:]) != shape:
        raise ModelError(
            f"{path}: its metadata tell of inputs {shape} and {len(spec.classes)} classes, its graph of "
            f"{tuple(taken.shape[1:])} and {given.shape[-1]}; export it again"
        )
    return Deployed(
        path=path,
        session=session,
        spec=spec,
        job=told["job"],
        round=told.get("round", ""),
        input_name=taken.name,
        output_name=given.name,
        preprocessing=preprocessing,
        probabilities=told.get("output") == "probabilities",
        tokenizer=told.get("tokenizer", ""),
    )


def _can_be_normalised(spec: ModelSpec) -> bool:
    if spec.table is not None:
        table = spec.table
        finite = all(math.isfinite(value) for value in (*table.mean, *table.std)) and all(table.std)
        return len(table.mean) == len(table.std) == len(table.numeric) and finite
    if spec.input_type is InputType.TOKENS:
        return True
    channels = spec.input_shape[0] if spec.input_shape else 0
    finite = all(math.isfinite(value) for value in (*spec.mean, *spec.std))
    return len(spec.mean) == len(spec.std) == channels and finite and all(spec.std)


def probabilities(model: Deployed, samples: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(N, classes) for samples as they are stored: images of shape (N, C, H, W), 0..255, or rows."""
    inputs = samples if model.preprocessing else model_inputs(samples, model.spec)
    try:
        outputs = model.session.run([model.output_name], {model.input_name: inputs})[0].astype(np.float64)
    except RUNTIME_ERRORS as error:
        raise ModelError(
            f"{model.path} cannot be run on {len(samples)} samples at once: {first_line(error)}; if it was changed "
            "after the export, export it again"
        ) from None
    if model.probabilities:
        return np.asarray(outputs)
    powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def classify(model: Deployed, files: Sequence[Path], top: int = 1) -> Iterator[Prediction]:
    """What a model says of image files, one after the other; read as in training.

    Raises:
        ModelError: it takes no images.
    """
    shape = model.spec.input_shape
    if len(shape) != 3 or shape[0] not in (1, 3) or model.spec.input_type is not InputType.FLOAT:
        raise ModelError(
            f"{model.path} takes {model.spec.input_type.value} inputs of shape {shape}; infer reads image files, and "
            "rows for models of texts and tables: run this file with onnxruntime, as docs/export.md shows"
        )
    yield from _predicted(model, ((file, 0, _decoded(file, shape)) for file in files), top)


def classify_rows(model: Deployed, files: Sequence[Path], top: int = 1) -> Iterator[Prediction]:
    """The same of the rows of files, for a model of texts or of a table: the columns that it was trained on are read,
    and its label, if it is there, is not."""
    columns = model.spec.columns
    assert columns is not None, "only rows have columns"
    encode = sample_encoder(model.spec, model.tokenizer)

    def samples() -> Iterator[_Read]:
        for file in files:
            line = 0
            try:
                for line, values, problem in read_records(file, columns.columns):
                    try:
                        yield file, line, f"{file}, line {line}: {problem}" if problem else encode(values)
                    except RowError as error:
                        yield file, line, f"{file}, line {line}: {error}"
                if not line:
                    yield file, 0, f"{file} holds no row"
            except DataError as error:
                yield file, 0, str(error)
            except OSError as error:
                yield file, 0, f"{file} cannot be read: {error.strerror or error}"

    yield from _predicted(model, samples(), top)


def _predicted(model: Deployed, samples: Iterable[_Read], top: int) -> Iterator[Prediction]:
    following = iter(samples)
    while read := list(islice(following, AT_ONCE)):
        sound = [sample for _, _, sample in read if not isinstance(sample, str)]
        rows = iter(list(probabilities(model, np.stack(sound))) if sound else [])
        for file, line, sample in read:
            if isinstance(sample, str):
                yield Prediction(file, error=sample, line=line)
            elif not np.isfinite(row := next(rows)).all():
                where = f"{file}, line {line}" if line else f"{file}"
                yield Prediction(file, error=f"{model.path} gives no finite numbers for {where}", line=line)
            else:
                best = np.argsort(-row, kind="stable")[:top]
                likeliest = tuple((model.spec.classes[index], float(row[index])) for index in best)
                yield Prediction(file, likeliest, line=line)


def row_files(paths: Sequence[Path]) -> tuple[list[Path], tuple[LeftOut, ...]]:
    """The files with rows that are meant, of a folder all that lie in it; and what else lies there.

    Raises:
        DataError: one of them does not exist or cannot be read, or a folder holds none.
    """
    found: list[Path] = []
    unused: list[tuple[str, str]] = []
    for path in paths:
        if not path.exists():
            raise DataError(
                f"{quoted(str(path))} does not exist; give files with rows, such as CSV, or folders of them"
            )
        if not path.is_dir():
            found.append(path)
            continue
        inside = files_with_rows(path)
        others = [(reason, str(path / name)) for reason, name in no_row_files(path)]
        if not inside:
            raise DataError(
                f"{quoted(str(path))} holds no files with rows: looked for *{', *'.join(SUFFIXES)}{_but(others)}"
            )
        found += inside
        unused += others
    return found, gathered(unused)


def image_files(paths: Sequence[Path]) -> tuple[list[Path], tuple[LeftOut, ...]]:
    """The files that are meant, folders with all images below them; and what else lies in the folders.

    A folder that cannot be read is among the files, as something that cannot be read.

    Raises:
        DataError: one of them does not exist, or there is no image among them.
    """
    found: list[Path] = []
    unused: list[tuple[str, str]] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{quoted(str(path))} does not exist; give image files, or folders of them")
        waiting = [path] if path.is_dir() else []
        while waiting:  # folders may lie deeper in each other than functions can
            waiting += reversed(_search(waiting.pop(), found, unused))
        if not path.is_dir():
            found.append(path)
    if not found:
        raise DataError(
            f"no images in {', '.join(map(str, paths))}: looked for *{', *'.join(sorted(IMAGE_SUFFIXES))} in folders"
            f"{_but(unused)}"
        )
    return found, gathered(unused)


def _search(folder: Path, found: list[Path], unused: list[tuple[str, str]]) -> list[Path]:
    """Adds the images in a folder, sorted, and what is left out: why, and where. Returns the folders in it."""
    inner: list[Path] = []
    images: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = folder / entry.name
                reason = hidden(entry.name)
                if not reason and is_folder(entry):
                    reason = "link to a folder, which is not followed" if entry.is_symlink() else ""
                    if not reason:
                        inner.append(path)
                elif not reason:
                    reason = not_an_image(entry)
                    if not reason:
                        images.append(path)
                if reason:
                    unused.append((reason, str(path)))
    except OSError:
        images.append(folder)
    found += sorted(images)
    return sorted(inner)


def _but(unused: Iterable[tuple[str, str]]) -> str:
    """What a folder holds instead."""
    rows = gathered(unused)[:_REASONS_SHOWN]
    return f"; it does hold {'; '.join(map(str, rows))}" if rows else ""


def as_json(model: Deployed, predictions: Sequence[Prediction]) -> str:
    """One JSON object."""
    files = [
        {
            "file": str(each.file),
            **({"line": each.line} if each.line else {}),
            **(
                {"error": each.error}
                if each.error
                else {"classes": [{"class": name, "probability": probability} for name, probability in each.classes]}
            ),
        }
        for each in predictions
    ]
    return json.dumps({"model": str(model.path), "job": model.job, "round": model.round, "files": files})


def _decoded(file: Path, shape: tuple[int, ...]) -> npt.NDArray[np.uint8] | str:
    try:
        return decode_image(file, shape)
    except DataError as error:
        return str(error)
