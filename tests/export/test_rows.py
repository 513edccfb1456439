"""Exports of models of texts and tables: parity, pre-processing within the file, and what `fedepth infer` needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from fedepth.data.rows import Rows
from fedepth.data.transforms import model_inputs
from fedepth.export import infer
from fedepth.export.onnx import export, random_samples
from fedepth.job_sections import ExportSection
from fedepth.models.export import Exported, export_model
from fedepth.models.load import load_model
from fedepth.models.tables import TableResNet
from fedepth.models.text_transformer import TextTransformer
from fedepth.task import Category, InputType, ModelSpec, TableSpec, TextSpec
from fedepth.weights import save

VOCABULARY = 100
TEXTS = ModelSpec(
    "text-transformer", ("bad", "good"), (6,), (), (), InputType.TOKENS, text=TextSpec("label", ("text",), VOCABULARY)
)
COLUMNS = TableSpec(
    "label", ("x", "year"), (1.0, 1.7e9), (2.0, 1e7), (Category("c", ("r", "g")), Category("d", ("1", "2", "3")))
)
TABLE = ModelSpec("table-resnet", ("bad", "good"), (COLUMNS.features,), (), (), table=COLUMNS)
SPECS = {"text": TEXTS, "table": TABLE}
PLAIN = ExportSection(output="probabilities")
WHOLE = ExportSection(output="probabilities", preprocessing=True)
HALF = ExportSection(output="probabilities", preprocessing=True, precision="float16")
CSV = {
    "text": "label,text\ngood,The cat sat\nbad,one two three four five six seven\n,no label\nbad,\n",
    "table": "year;c;x;d\n1700000000;r;3.5;2\n;blue;;\n1710000000;g;-1;3\n1;r;1,5;1\n",
}


def exported(spec: ModelSpec) -> Exported:
    torch.manual_seed(5)
    module = (
        TextTransformer(VOCABULARY, 6, 2, width=16, layers=1, heads=2)
        if spec.text
        else TableResNet(spec.input_shape[0], 2, width=16, blocks=1)
    )
    return export_model(module, spec.name, spec.input_shape, spec.input_type.dtype, 2)


class Written:
    """Exports, each made once: one takes seconds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[tuple[str, ExportSection], Path] = {}
        self.models: dict[str, tuple[Exported, Path]] = {}
        for name, spec in SPECS.items():
            model = exported(spec)
            weights = folder / f"{name}.safetensors"
            save(weights, {each: tensor.numpy() for each, tensor in model.tensors.items()})
            self.models[name] = (model, weights)

    def __call__(self, name: str, choices: ExportSection) -> Path:
        if (name, choices) not in self._files:
            spec, (model, weights) = SPECS[name], self.models[name]
            folder = self._folder / str(len(self._files))
            folder.mkdir()
            samples = random_samples(spec, model.graph, 40)
            path = folder / "model.onnx"
            report = export(
                spec, model.graph, weights, path, job="j", round=3, weights_digest="d", samples=samples, choices=choices
            )
            assert report.parity_max_abs <= (1e-2 if choices.precision == "float16" else 1e-4)
            assert report.top1_equal + report.ties == 40
            self._files[name, choices] = path
        return self._files[name, choices]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(("name", "choices"), [("text", PLAIN), ("table", PLAIN), ("table", WHOLE), ("table", HALF)])
def test_an_export_says_of_rows_what_the_model_says(
    tmp_path: Path, written: Written, name: str, choices: ExportSection
) -> None:
    spec, path = SPECS[name], written(name, choices)
    rows = tmp_path / "rows.csv"
    rows.write_text(CSV[name])
    deployed = infer.open_deployed(path)
    assert (deployed.spec.text, deployed.spec.table) == (spec.text, spec.table)
    found = list(infer.classify_rows(deployed, [rows], top=2))
    sound = [each for each in found if not each.error]
    assert [each.line for each in sound] == [2, 3, 4]
    (damaged,) = [each for each in found if each.error]
    assert damaged.line == 5
    assert ("has no text" if name == "text" else "'1,5', which is not a number") in damaged.error

    labelled = CSV[name].replace("\n,no label", "\nbad,no label") if name == "text" else _with_labels(CSV[name])
    rows.write_text(labelled)
    data = Rows([rows], spec)
    model = load_model(written.models[name][0].graph, written.models[name][1])
    with torch.inference_mode():
        inputs = torch.from_numpy(model_inputs(data.read(np.arange(len(data))), spec))
        expected = model(inputs).softmax(1).numpy()
    got = np.array([[dict(each.classes)[name] for name in spec.classes] for each in sound])
    np.testing.assert_allclose(got, expected, atol=2e-2 if choices is HALF else 1e-5)


def _with_labels(text: str) -> str:
    header, *lines = text.splitlines()
    return "\n".join([f"{header};label", *(f"{line};bad" for line in lines)])


def test_metadata_say_what_goes_in(written: Written) -> None:
    model = onnx.load(written("table", WHOLE))
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(told["table"])["numeric"] == ["x", "year"]
    assert told["input"].startswith("float64 (N, 4): the columns of the metadata's table")
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.DOUBLE
    told = {entry.key: entry.value for entry in onnx.load(written("text", PLAIN)).metadata_props}
    assert json.loads(told["text"])["vocabulary"] == VOCABULARY
    assert told["input"] == "int64 (N, 6): token ids, hashes of words, 0 behind the last one"
    assert told["tokenizer"] == ""


def test_padding_changes_nothing() -> None:
    torch.manual_seed(5)
    model = TextTransformer(VOCABULARY, 6, 2, width=16, layers=2, heads=2).eval()
    short, other = torch.tensor([[7, 8, 9, 0, 0, 0]]), torch.tensor([[7, 8, 9, 5, 0, 0]])
    with torch.no_grad():
        before = model(short)
        assert not torch.allclose(before, model(other))
        x = model.embedding(short)
        assert torch.equal(x[0, :, 0], torch.tensor([1.0, 1, 1, 0, 0, 0]))
        assert torch.equal(x[0, 3:], torch.zeros(3, 16))
        for layer in model.layers:
            x = layer(x)
            assert torch.equal(x[0, 3:], torch.zeros(3, 16))
        # What stands behind the last token, and how the activations are rounded on the way, is of no consequence.
        model.embedding.tokens.weight[0] = 100.0
        model.embedding.positions[3:] = 100.0
        assert torch.equal(before, model(short))
        assert torch.isfinite(model(torch.zeros(1, 6, dtype=torch.int64))).all()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("text", "{", "its metadata cannot be read"),
        ("text", '{"label": "l", "text": ["t"], "vocabulary": 100, "tokenizer": "%s"}' % ("0" * 64), "the job names"),
        ("input_shape", "[7]", "its metadata tell of inputs (7,)"),
    ],
)
def test_a_changed_file_is_refused(tmp_path: Path, written: Written, key: str, value: str, words: str) -> None:
    path, model = tmp_path / "changed.onnx", onnx.load(written("text", PLAIN))
    for entry in model.metadata_props:
        if entry.key == key:
            entry.value = value
    onnx.save(model, path)
    rows = tmp_path / "rows.csv"
    rows.write_text("text\nx\n")
    with pytest.raises(infer.DataError if "names" in words else infer.ModelError) as caught:
        list(infer.classify_rows(infer.open_deployed(path), [rows]))
    assert words in str(caught.value)


def test_rows_without_the_columns_of_the_model(tmp_path: Path, written: Written) -> None:
    deployed = infer.open_deployed(written("text", PLAIN))
    rows = tmp_path / "rows.csv"
    rows.write_text("message\nx\n")
    told = list(infer.classify_rows(deployed, [rows]))
    assert [each.error for each in told] == [f"{rows} has no column 'text'; it has 'message'"]
    assert infer.row_files([tmp_path, rows]) == ([rows, rows], ())
    with pytest.raises(infer.DataError, match="does not exist; give files with rows"):
        infer.row_files([tmp_path / "no"])
    assert replace(deployed.spec, name="m").sample_type == "U16"
