"""What people do with an exported model, and what they ask of an export.

A further case is a row of one of the tables.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from coordinator.model_worker import process
from coordinator.model_worker.protocol import Export
from fedepth.cli import app
from fedepth.errors import ConfigError, DataError, ExportError, FedepthError, ModelError
from fedepth.export.infer import Deployed, classify, image_files, labels_text, open_deployed
from fedepth.export.onnx import export, random_samples
from fedepth.export.opset import lower, opset_of
from fedepth.export.samples import comparison_samples
from fedepth.job import load_config, with_export
from fedepth.job_sections import ExportSection
from fedepth.models.export import Exported, export_model
from fedepth.task import InputType, ModelSpec, TextSpec
from fedepth.weights import save

COLOURS = ("red", "green\nor lime", "blue\\azure")
PURE = {"r.png": (255, 0, 0), "g.jpg": (0, 255, 0), "b.bmp": (0, 0, 255)}
SPEC = ModelSpec("colours", COLOURS, (3, 8, 8), (0.3, 0.4, 0.5), (0.2, 0.25, 0.3))
DOCS = Path(__file__).parents[2] / "docs" / "export.md"


def colours() -> nn.Module:
    """The class of an image is its strongest colour, by the mean of what is normalised: it shows every mistake."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.copy_(torch.eye(3).reshape(layer.weight.shape))
            layer.bias.zero_()
    return model


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Exported, Path]:
    """The model as a graph, and the file of its weights."""
    exported = export_model(colours(), SPEC.name, SPEC.input_shape, "F32", len(SPEC.classes))
    weights = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save(weights, {name: tensor.detach().numpy() for name, tensor in exported.tensors.items()})
    return exported, weights


@pytest.fixture(scope="module")
def written(graph: tuple[Exported, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports with some choices, each made once."""
    made: dict[str, Path] = {}

    def write(**choices: Any) -> Path:
        key = json.dumps(choices)
        if key not in made:
            exported, weights = graph
            output = tmp_path_factory.mktemp("models") / "model.onnx"
            samples = random_samples(SPEC, exported.graph, 8)
            told: dict[str, Any] = {"job": "colours", "round": 3, "weights_digest": "d", "samples": samples}
            export(SPEC, exported.graph, weights, output, choices=ExportSection(**choices), **told)
            made[key] = output
        return made[key]

    return write


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, colour in PURE.items():
        Image.new("RGB", (20, 10), colour).save(folder / name)
    (folder / "deep" / "er").mkdir(parents=True)
    Image.new("RGB", (8, 8), (0, 0, 255)).save(folder / "deep" / "er" / "B.PNG")
    (folder / "notes.txt").write_text("no image")
    return folder


def infer(*argv: object) -> Any:
    return CliRunner().invoke(app, ["infer", *map(str, argv)], env={"COLUMNS": "200"})


CHOICES: list[dict[str, Any]] = [
    {},
    {"preprocessing": True, "output": "probabilities", "input_name": "conv2d", "output_name": "linear"},
    {"preprocessing": True, "precision": "float16", "opset": 17},
]


@pytest.mark.parametrize("choices", CHOICES)
def test_colours_are_named_whatever_was_chosen_for_the_file(
    written: Callable[..., Path], photos: Path, choices: dict[str, Any]
) -> None:
    path = written(**choices)
    told = json.loads(infer(path, photos, "--json", "--top", 3).stdout)
    assert (told["job"], told["round"]) == ("colours", "3")
    found = {Path(each["file"]).name: each["classes"] for each in told["files"]}
    wanted = {"r.png": COLOURS[0], "g.jpg": COLOURS[1], "b.bmp": COLOURS[2], "B.PNG": COLOURS[2]}
    assert {name: classes[0]["class"] for name, classes in found.items()} == wanted
    assert all(sum(each["probability"] for each in classes) == pytest.approx(1) for classes in found.values())
    # softmax of ((1, 0, 0) - mean) / std
    first = {each["class"]: each["probability"] for each in found["r.png"]}
    logits = (np.float64([1, 0, 0]) - SPEC.mean) / SPEC.std
    exact = np.exp(logits) / np.exp(logits).sum()
    assert [first[name] for name in COLOURS] == pytest.approx(exact, abs=1e-5 if len(choices) != 3 else 5e-3)


def test_onnx_runtime_reports_to_nobody(written: Callable[..., Path], tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from fedepth.export.infer import open_deployed; open_deployed(pathlib.Path(sys.argv[1]))"
    )
    alone = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}  # it is silent where it sees that it is tested
    subprocess.run([sys.executable, "-c", code, str(written())], env=alone, check=True, timeout=120)
    assert list(tmp_path.rglob("*")) == []  # neither the number of this machine, nor what waits to be sent


@pytest.mark.parametrize("choices", CHOICES)
def test_a_file_says_what_goes_in_and_comes_out(written: Callable[..., Path], choices: dict[str, Any]) -> None:
    path = written(**choices)
    model = onnx.load(path)
    told = {each.key: each.value for each in model.metadata_props}
    (given,), (taken,) = model.graph.output, model.graph.input
    section = ExportSection(**choices)
    assert (taken.name, given.name) == (section.input_name, section.output_label)
    assert (told["input_name"], told["output_name"]) == (taken.name, given.name)
    assert (told["output"], told["precision"]) == (section.output, section.precision)
    assert taken.type.tensor_type.elem_type == (TensorProto.UINT8 if section.preprocessing else TensorProto.FLOAT)
    assert given.type.tensor_type.elem_type == TensorProto.FLOAT
    assert told["input"].startswith("uint8 (N, 3, 8, 8): RGB" if section.preprocessing else "float32 (N, 3, 8, 8): RGB")
    assert [each.dim_param != "" for each in taken.type.tensor_type.shape.dim] == [True, False, False, False]
    assert (opset_of(model), model.ir_version) == ((17, 8) if section.opset else (14, 7))
    stored = {each.data_type for each in model.graph.initializer if len(each.dims) > 1}
    assert TensorProto.FLOAT16 in stored if section.precision == "float16" else stored <= {TensorProto.FLOAT, 7}
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)  # no paths of this machine
    assert (path.parent / "labels.txt").read_text() == "red\ngreen\\nor lime\nblue\\\\azure\n"


def test_the_example_of_the_documentation_names_the_colour(
    written: Callable[..., Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for choices in CHOICES:
        for name, wanted in (("r.png", "red"), ("b.bmp", COLOURS[2])):
            (tmp_path / "model.onnx").write_bytes(written(**choices).read_bytes())
            Image.open(photos / name).save("photo.png")
            exec(compile(example, "docs/export.md", "exec"), {})
            assert capsys.readouterr().out == f"{wanted}\n"


def test_a_table_shows_every_file_and_what_is_left_out_is_told(written: Callable[..., Path], photos: Path) -> None:
    shown = infer(written(), photos, "--top", 2)
    assert shown.exit_code == 0
    assert re.search(r"r\.png +red +\d+\.\d%", shown.stdout)
    assert re.search(r"g\.jpg +green\\nor lime +\d+\.\d%", shown.stdout)
    assert len(re.findall(r"\d\.\d%", shown.stdout)) == 8
    assert f"left out: 1 × not an image (.txt), such as {photos}/notes.txt" in shown.stderr


def test_a_folder_is_searched_as_one_of_training_data(tmp_path: Path) -> None:
    for name in ("a/1.png", ".thumbs/2.png", "__MACOSX/3.png", "a/.4.png", "a/5.txt", "@eaDir/6.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "6.png")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    found, left_out = image_files([tmp_path])
    assert found == [tmp_path / "a" / "1.png"]
    assert {row.reason: (row.count, row.example) for row in left_out} == {
        "hidden": (2, f"{tmp_path}/.thumbs"),
        "folder of an operating system": (2, f"{tmp_path}/@eaDir"),
        "not an image (.txt)": (1, f"{tmp_path}/a/5.txt"),
        "a pipe": (1, f"{tmp_path}/6.png"),
        "link to a folder, which is not followed": (1, f"{tmp_path}/link"),
    }


def test_a_folder_that_cannot_be_read_is_named_as_a_file_is(
    written: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/1.png", "locked/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert image_files([tmp_path]) == ([tmp_path / "a" / "1.png", tmp_path / "locked"], ())
    shown = infer(written(), tmp_path / "locked")
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert f"fedepth: {tmp_path}/locked is not a file" in shown.stderr  # to root it is a folder like any other


def test_folders_may_lie_deep_in_each_other(tmp_path: Path) -> None:
    folders = [tmp_path]
    while len(folders) < sys.getrecursionlimit() + 50:
        folders.append(folders[-1] / "d")
        folders[-1].mkdir()
    image = folders[-1] / "1.png"
    image.touch()
    try:
        assert image_files([tmp_path]) == ([image], ())
    finally:  # which is too deep for those who tidy up, too
        image.unlink()
        for folder in reversed(folders[1:]):
            folder.rmdir()


# What lies in a folder that is given to a model of rows, and what is said of it.
ROW_FOLDERS: dict[str, tuple[dict[str, str], list[str], list[str]]] = {
    "all is well": ({"a.csv": "text\none\n"}, [], []),
    "one has other columns": ({"a.csv": "text\none\n", "b.csv": "word\nx\n"}, ["b.csv has no column 'text'"], []),
    "one is empty": ({"a.csv": "text\none\n", "b.csv": ""}, ["b.csv is empty"], []),
    "one has no row": ({"a.csv": "text\none\n", "b.csv": "text\n"}, ["b.csv holds no row"], []),
    "a spreadsheet, a folder, text": (
        {"a.csv": "text\none\n", "b.xlsx": "x", "c/d.csv": "text\none\n", "e": "x"},
        [],
        ["1 × a spreadsheet: save it as CSV, such as", "1 × a folder: only files beside it are", "(without a suffix)"],
    ),
}


@pytest.mark.parametrize("case", ROW_FOLDERS)
def test_a_file_of_rows_that_cannot_be_read_is_named_and_the_others_are_shown(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, errors, left_out = ROW_FOLDERS[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    spec = ModelSpec("m", ("no", "yes"), (4,), (), (), InputType.TOKENS, text=TextSpec("label", ("text",), 100))
    session = SimpleNamespace(run=lambda names, inputs: [np.float32([[1, 2]] * len(inputs["ids"]))])
    deployed = Deployed(tmp_path / "m.onnx", session, spec, "j", "1", "ids", "logits", False, False)
    monkeypatch.setattr("fedepth.export.infer.open_deployed", lambda path: deployed)
    shown = infer("m.onnx", tmp_path)
    assert shown.exit_code == (1 if errors else 0)
    assert re.search(r"a\.csv:2 +yes +73\.1%", shown.stdout)
    for said in errors + left_out:
        assert said in shown.stderr
    assert shown.stderr.count("\n") == len(errors + left_out)


def test_a_damaged_image_is_named_and_the_others_are_shown(
    written: Callable[..., Path], photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "half.png").write_bytes((photos / "r.png").read_bytes()[:40])
    (tmp_path / "whole.png").write_bytes((photos / "r.png").read_bytes())
    shown = infer(written(), tmp_path)
    assert shown.exit_code == 1
    assert re.search(r"whole\.png +red", shown.stdout)
    assert re.search(r"fedepth: .*half\.png.* cannot be read", shown.stderr)
    told = json.loads(infer(written(), tmp_path, "--json").stdout)
    assert [sorted(each) for each in told["files"]] == [["error", "file"], ["classes", "file"]]


def foreign(path: Path, **metadata: str) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)


def with_second_output(path: Path, good: Path) -> None:
    model = onnx.load(good)
    model.graph.output.append(helper.make_tensor_value_info(model.graph.node[0].output[0], TensorProto.FLOAT, None))
    onnx.save(model, path)


def with_batch(path: Path, good: Path, batch: int) -> None:
    """As a tool makes it that wants fixed shapes."""
    model = onnx.load(good)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(model, path)


TOLD = {"job": "j", "classes": '["a", "b"]', "input_shape": "[2]", "mean": "[0, 0]", "std": "[1, 1]"}
NO_MODELS: list[tuple[str, Callable[[Path, Path], object], str]] = [
    ("missing", lambda path, _: None, "cannot be read: No such file"),
    ("a folder", lambda path, _: path.mkdir(), "cannot be read: Is a directory"),
    ("empty", lambda path, _: path.write_bytes(b""), "cannot be loaded by ONNX Runtime"),
    ("text", lambda path, _: path.write_text("not a model"), "cannot be loaded by ONNX Runtime .* damaged"),
    ("half", lambda path, good: path.write_bytes(good.read_bytes()[:500]), "cannot be loaded by ONNX Runtime"),
    ("another's", lambda path, _: foreign(path), "not a model that fedepth exported: its metadata have no job"),
    ("odd classes", lambda path, _: foreign(path, **{**TOLD, "classes": "[1"}), "metadata cannot be read"),
    ("odd type", lambda path, _: foreign(path, **TOLD, input_type="sound"), "metadata cannot be read: 'sound'"),
    ("odd count", lambda path, _: foreign(path, **{**TOLD, "classes": '["a"]'}), "1 classes, its graph of .* and 2"),
    ("no deviation", lambda path, _: foreign(path, **{**TOLD, "std": "[0, 1]"}), "no mean and std for each channel"),
    ("one mean short", lambda path, _: foreign(path, **{**TOLD, "mean": "[0]"}), "no mean and std for each channel"),
    ("a second output", lambda path, good: with_second_output(path, good), "has 1 inputs and 2 outputs"),
    ("one image at a time", lambda path, good: with_batch(path, good, 3), "cannot be run on 1 samples at once"),
    ("a pipe", lambda path, _: os.mkfifo(path), "cannot be read: is not a regular file"),
    (
        "vectors",
        lambda path, _: foreign(path, **TOLD),
        r"takes float inputs of shape \(2,\); infer reads image files, and",
    ),
]


@pytest.mark.parametrize(("make", "message"), [row[1:] for row in NO_MODELS], ids=[row[0] for row in NO_MODELS])
def test_what_is_no_model_for_images_is_told_in_a_sentence(
    written: Callable[..., Path], photos: Path, tmp_path: Path, make: Callable[[Path, Path], object], message: str
) -> None:
    make(tmp_path / "m.onnx", written())
    with pytest.raises(ModelError, match=message) as caught:
        list(classify(open_deployed(tmp_path / "m.onnx"), [photos / "r.png"]))
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_are_told(written: Callable[..., Path], tmp_path: Path) -> None:
    for argument, message in ((tmp_path / "none.png", "does not exist"), (tmp_path, "no images in")):
        result = infer(written(), argument)
        assert isinstance(result.exception, DataError)
        assert message in str(result.exception)


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        (("a", "b"), "a\nb\n"),
        (("a b ", "", "ä\tö"), "a b \n\nä\tö\n"),
        (("a\r\nb", "c\u2028d", "e\\f"), "a\\r\\nb\nc\\u2028d\ne\\\\f\n"),
    ],
)
def test_labels_have_one_line_each(classes: tuple[str, ...], text: str) -> None:
    assert labels_text(classes) == text
    assert len(text.splitlines()) == len(classes)


def test_the_labels_of_another_model_stay(graph: tuple[Exported, Path], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    exported, weights = graph
    told: dict[str, Any] = {"job": "j", "round": 1, "weights_digest": ""}
    with pytest.raises(ExportError, match=r"labels\.txt has the classes of another model"):
        export(
            SPEC, exported.graph, weights, tmp_path / "m.onnx", samples=random_samples(SPEC, exported.graph, 1), **told
        )
    assert [path.name for path in tmp_path.iterdir()] == ["labels.txt"]


def model_of(operator: str, inputs: int = 1, outputs: int = 1, opset: int = 18, **attributes: Any) -> Any:
    """A model with one operator, whose further inputs are constants."""
    names = [f"y{index}" for index in range(outputs)]
    node = helper.make_node(operator, ["x", "c", "d"][:inputs], names, **attributes)
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    result = (TensorProto.INT64, ["M"]) if operator == "Shape" else (TensorProto.FLOAT, ["M", "K"])
    infos = [helper.make_tensor_value_info(name, *result) for name in names]
    kind, values = (TensorProto.INT64, [1]) if operator.startswith("Reduce") else (TensorProto.FLOAT, [1.0] * 4)
    constants = [helper.make_tensor(name, kind, [len(values)], values) for name in ("c", "d")[: inputs - 1]]
    graph = helper.make_graph([node], "g", [value], infos, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


OPSETS: list[tuple[Any, int, int]] = [  # a model, the lowest opset, the IR version for it
    (model_of("Relu"), 13, 7),
    (model_of("ReduceMean", 2, noop_with_empty_axes=0), 13, 7),
    (model_of("Split", outputs=2, axis=1, num_outputs=2), 13, 7),
    (model_of("HardSwish"), 14, 7),
    (model_of("Reshape", 1, allowzero=1), 18, 8),  # is not valid: nothing is known of it
    (model_of("Shape", start=1), 15, 8),
    (model_of("LayerNormalization", 3, axis=-1), 17, 8),
    (model_of("Mish"), 18, 8),
    (model_of("Gelu", opset=20), 20, 9),
    (model_of("RMSNormalization", 2, opset=23), 23, 11),
]


@pytest.mark.parametrize(("model", "opset", "ir"), OPSETS, ids=[row[0].graph.node[0].op_type for row in OPSETS])
def test_a_model_gets_the_lowest_opset_that_has_its_operators(model: Any, opset: int, ir: int) -> None:
    operator, copy = model.graph.node[0].op_type, onnx.ModelProto()
    copy.CopyFrom(model)
    lower(copy, None, "m")
    assert (opset_of(copy), copy.ir_version) == (opset, ir)
    if operator != "Reshape":
        onnx.checker.check_model(copy, full_check=True)
    if opset > 13:
        with pytest.raises(
            ExportError, match=f"^m cannot be exported with opset 13: its operator {operator} needs {opset};"
        ):
            lower(model, 13, "m")


JOB = """[job]
name = "demo"
[model]
name = "digits-cnn"
classes = 10
input_shape = [1, 8, 8]
"""


def test_a_job_needs_no_test_data(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    config = load_config(tmp_path / "job.toml")
    assert config.test_data == ""
    (tmp_path / "job.toml").write_text(JOB + "[guard]\nlargest_drop = 0.1\n")
    with pytest.raises(ConfigError, match=r"^job\.toml: \[guard\] largest_drop: needs test data to know the accuracy"):
        load_config(tmp_path / "job.toml")


REFUSED: list[tuple[str, str]] = [
    ('[export]\noutput_name = "images"', "[export] output_name: must not be the input's, 'images'"),
    ('[export]\ninput_name = "logits"', "[export] output_name: must not be the input's, 'logits'"),
    ("[export]\nopset = 12", "[export] opset: "),
    ('[export]\nprecision = "int8"', "[export] precision: "),
    ("[export]\nopsett = 17", "[export] opsett: no such setting; did you mean opset?"),
]


@pytest.mark.parametrize(("section", "message"), REFUSED)
def test_a_choice_that_cannot_be_is_refused_before_anything_is_trained(
    tmp_path: Path, section: str, message: str
) -> None:
    (tmp_path / "job.toml").write_text(JOB + section)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "job.toml")
    assert message in str(caught.value)


def test_options_override_the_job_file(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB + "[export]\nevery = 2\nopset = 17\npreprocessing = true\n")
    config = load_config(tmp_path / "job.toml")
    changed = with_export(config, opset=None, precision="float16", preprocessing=False).export
    assert (changed.every, changed.opset, changed.precision, changed.preprocessing) == (2, 17, "float16", False)
    tokens = msgspec.structs.replace(
        config, model=msgspec.structs.replace(config.model, input_type=InputType.TOKENS), export=ExportSection()
    )
    with pytest.raises(ConfigError, match="preprocessing: token ids need none"):
        with_export(tokens, preprocessing=True)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "256 random inputs, since the job has no test data"),
        ("gone", "256 random inputs, since the test data cannot be read: .*gone"),
        ("empty", "256 random inputs, since the test data cannot be read: .*empty"),
    ],
)
def test_without_test_data_random_inputs_are_compared_and_it_says_so(
    graph: tuple[Exported, Path], tmp_path: Path, data: str | None, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    where = "" if data is None else str(tmp_path / data)
    samples, told = comparison_samples(SPEC, SimpleNamespace(graph=graph[0].graph, tokenizer=""), where)
    assert re.fullmatch(said + ".*", told)
    assert samples.shape == (256, 3, 8, 8)


def test_an_export_without_test_data_is_written(
    graph: tuple[Exported, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported, weights = graph
    monkeypatch.setattr(process, "read_traced", lambda path: SimpleNamespace(graph=exported.graph, tokenizer=""))
    request = Export(SPEC, "g", str(weights), "d", "job", 1, "", str(tmp_path / "out" / "m.onnx"))
    told = process.export_onnx(request, lambda text: None)
    assert told["compared_on"] == "256 random inputs, since the job has no test data"
    assert (told["samples"], told["top1_equal"] + told["ties"]) == (256, 256)
    assert (tmp_path / "out" / "m.onnx").stat().st_size == told["size_bytes"]


def test_random_inputs_have_the_jobs_mean_and_deviation(graph: tuple[Exported, Path]) -> None:
    samples = random_samples(SPEC, graph[0].graph, 200) / 255
    assert samples.shape == (200, 3, 8, 8)
    assert samples.mean((0, 2, 3)) == pytest.approx(SPEC.mean, abs=0.03)
    assert samples.std((0, 2, 3)) == pytest.approx(SPEC.std, abs=0.05)
    assert np.array_equal(samples, random_samples(SPEC, graph[0].graph, 200) / 255)


def test_float16_is_refused_for_a_model_that_needs_more(graph: tuple[Exported, Path], tmp_path: Path) -> None:
    exported, _ = graph
    tensors = {name: tensor.detach().numpy() * 1.0 for name, tensor in exported.tensors.items()}
    first, *_, last = [name for name, tensor in tensors.items() if tensor.ndim > 1]
    tensors[first], tensors[last] = tensors[first] * 1e6, tensors[last] / 1e6  # beyond 65,504 in between
    save(tmp_path / "w.safetensors", {name: tensor.astype(np.float32) for name, tensor in tensors.items()})
    told: dict[str, Any] = {"job": "j", "round": 1, "weights_digest": "", "choices": ExportSection(precision="float16")}
    samples = random_samples(SPEC, exported.graph, 4)
    with pytest.raises(FedepthError, match=r'float16 does not suit this model; use precision "float32"'):
        export(SPEC, exported.graph, tmp_path / "w.safetensors", tmp_path / "m.onnx", samples=samples, **told)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
