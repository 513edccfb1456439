"""Whole tasks on rows of files: every stage, every cache, and the same as training by hand on the same inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedepth.data.read import open_images
from fedepth.data.rows import Rows
from fedepth.data.text import tokenizer_digest
from fedepth.data.transforms import model_inputs
from fedepth.errors import DataError
from fedepth.estimate.tracing import trace_costs
from fedepth.files import file_digest
from fedepth.memory.meter import Baseline
from fedepth.models.export import export_model
from fedepth.models.run import Model
from fedepth.models.tables import TableResNet
from fedepth.models.text_transformer import TextTransformer
from fedepth.models.traced import TracedModel, read_traced, write_traced
from fedepth.plan import CachePlace, CacheType, Plan, Policy
from fedepth.task import Category, InputType, ModelSpec, TableSpec, Task, TextSpec
from fedepth.training.cache import RowFormat
from fedepth.training.context import model_input
from fedepth.training.session import Assignment, Known, run
from fedepth.weights import load_numpy, save
from tests.training.jobs import COSTS, TRAINING, Quiet, stage

COLUMNS = TableSpec("label", ("x", "y"), (1.0, 2.0), (2.0, 3.0), (Category("c", ("r", "g")),))
TABLE = ModelSpec("table", ("a", "b"), (COLUMNS.features,), (), (), table=COLUMNS)
TEXTS = ModelSpec("texts", ("a", "b"), (6,), (), (), InputType.TOKENS, text=TextSpec("label", ("text",), 50))


class Hooks(Quiet):
    """Grants any budget, to a whole session."""

    def begin(self, epochs: int, baseline: Baseline) -> None: ...

    def rehearsing(self) -> None: ...


def module_of(spec: ModelSpec) -> torch.nn.Module:
    torch.manual_seed(7)
    if spec.table is not None:
        return TableResNet(spec.input_shape[0], 2, width=8, blocks=2)
    assert spec.text is not None
    return TextTransformer(spec.text.vocabulary, spec.input_shape[0], 2, width=8, layers=2, heads=2)


def write_rows(path: Path, spec: ModelSpec, count: int = 16) -> Path:
    rng = np.random.default_rng(1)
    if spec.table is not None:
        rows = [
            f"{'ab'[each % 2]},{rng.normal():.3f},{'' if each % 3 else rng.normal()},{rng.choice(['r', 'g', 'z'])}"
            for each in range(count)
        ]
        path.write_text("\n".join(["label,x,y,c", *rows]) + "\n")
    else:
        words = [f"w{each}" for each in range(30)]
        rows = [f"{'ab'[each % 2]},{' '.join(rng.choice(words, rng.integers(1, 9)))}" for each in range(count)]
        path.write_text("\n".join(["label,text", *rows]) + "\n")
    return path


def assignment(folder: Path, spec: ModelSpec, tokenizer: str = "", **training: object) -> Assignment:
    module = module_of(spec)
    exported = export_model(module, spec.name, spec.input_shape, spec.input_type.dtype, 2)
    weights, graph = folder / "weights.safetensors", folder / "graph.json"
    save(weights, {name: tensor.numpy() for name, tensor in exported.tensors.items()})
    costs = trace_costs(exported.graph, spec.name, TRAINING.batch)
    write_traced(graph, TracedModel(exported.graph, costs, tokenizer=tokenizer))
    places = (CachePlace.RAM, CachePlace.DISK)
    count = len(exported.graph.units)
    stages = tuple(stage(unit, unit, 4, places[unit % 2]) for unit in range(count))
    plan = Plan(stages, (), Policy.PAPER, 1 << 40)
    settings = replace(TRAINING, **training)  # type: ignore[arg-type]
    task = Task("t", 1, "job", 1, spec, settings, Policy.PAPER, plan, file_digest(graph), 0, "", 0, "")
    return Assignment(
        task=task,
        plan=plan,
        graph=graph,
        calibration=COSTS.calibration,
        weights=weights,
        data=write_rows(folder / "train.csv", spec),
        output=folder / "out",
        cache=folder / "cache",
        device_id="device",
        enforce=False,
    )


@pytest.mark.parametrize("spec", [TABLE, TEXTS], ids=["table", "texts"])
@pytest.mark.parametrize("cache_type", [CacheType.FLOAT32, CacheType.UINT8])
def test_a_task_trains_every_unit_of_a_model_of_rows(tmp_path: Path, spec: ModelSpec, cache_type: CacheType) -> None:
    asked = assignment(tmp_path, spec, cache_type=cache_type)
    result = run(asked, Hooks(), torch.device("cpu"), Known())
    assert result.sample_count == 16
    before = load_numpy(asked.weights)
    trained = {
        name: tensor for part in sorted(asked.output.glob("part-*")) for name, tensor in load_numpy(part).items()
    }
    assert trained.keys() == before.keys()
    assert all(np.isfinite(tensor).all() and (tensor != before[name]).any() for name, tensor in trained.items())


@pytest.mark.parametrize("spec", [TABLE, TEXTS], ids=["table", "texts"])
def test_an_optimizer_step_on_rows_is_that_of_the_whole_model(tmp_path: Path, spec: ModelSpec) -> None:
    asked = assignment(tmp_path, spec, local_epochs=1, batch=16, momentum=0.0, weight_decay=0.0)
    count = len(asked.plan.stages)
    whole = Plan((stage(0, count - 1, 16),), (), Policy.PAPER, 1 << 40)
    module = module_of(spec)
    for each in module.modules():
        if isinstance(each, torch.nn.Dropout):
            each.p = 0.0
    exported = export_model(module, spec.name, spec.input_shape, spec.input_type.dtype, 2)
    write_traced(asked.graph, TracedModel(exported.graph, trace_costs(exported.graph, spec.name, 16)))
    run(replace(asked, plan=whole, task=replace(asked.task, plan=whole)), Hooks(), torch.device("cpu"), Known())
    rows = open_images(asked.data, spec)
    inputs = torch.from_numpy(model_inputs(rows.read(np.arange(16)), spec))
    loss = F.cross_entropy(module.train()(inputs), torch.from_numpy(rows.labels))
    loss.backward()
    trained = {
        name: tensor for part in sorted(asked.output.glob("part-*")) for name, tensor in load_numpy(part).items()
    }
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        expected = (parameter - TRAINING.learning_rate * parameter.grad).detach().numpy()
        np.testing.assert_allclose(trained[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_rows_are_read_anew_only_where_the_file_or_the_job_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def counting(source: Path, spec: ModelSpec, *args: object, **kwargs: object) -> object:
        opened.append(spec.name)
        return open_images(source, spec, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("fedepth.training.session.open_images", counting)
    known, asked = Known(), assignment(tmp_path, TABLE, local_epochs=1)
    device = torch.device("cpu")
    for number in (1, 2):
        run(replace(asked, output=tmp_path / f"out{number}"), Hooks(), device, known)
        assert opened == ["table"]
    write_rows(asked.data, TABLE, 20)
    again = run(replace(asked, output=tmp_path / "out3"), Hooks(), device, known)
    assert (opened, again.sample_count) == (["table", "table"], 20)


@pytest.mark.parametrize("spec", [TABLE, TEXTS], ids=["table", "texts"])
def test_torch_and_numpy_make_the_same_inputs(tmp_path: Path, spec: ModelSpec) -> None:
    samples = open_images(write_rows(tmp_path / "rows.csv", spec), spec).read(np.arange(16))
    assert torch.equal(model_input(spec, torch.from_numpy(samples)), torch.from_numpy(model_inputs(samples, spec)))


@pytest.mark.parametrize(
    ("stored", "values"), [(torch.uint16, [0, 40_000, 65_535]), (torch.float64, [0.1, 1e300, -2.0])]
)
def test_a_cache_keeps_rows_to_the_bit(stored: torch.dtype, values: list[float]) -> None:
    rows = RowFormat((3,), None, stored=stored)
    batch = torch.tensor([values, values[::-1]], dtype=stored)
    encoded = rows.encode(batch)
    assert encoded.shape == (2, rows.row_bytes) and rows.row_bytes == 3 * stored.itemsize
    assert torch.equal(rows.decode(encoded).to(torch.float64), batch.to(torch.float64))


def test_a_tokenizer_comes_with_the_graph(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="needs the library tokenizers, of fedepth[text]")
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{each}": each + 2 for each in range(30)}}
    contents = json.dumps(
        {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"},
        }
    )  # fmt: skip
    spec = replace(TEXTS, text=TextSpec("label", ("text",), 32, tokenizer_digest(contents)))
    asked = assignment(tmp_path, spec, contents)
    assert run(asked, Hooks(), torch.device("cpu"), Known()).sample_count == 16
    rows = open_images(asked.data, spec, tokenizer=contents)
    assert isinstance(rows, Rows) and rows.read(np.arange(16)).max() <= 31
    write_traced(asked.graph, replace_tokenizer(asked.graph, contents.replace("w1", "v1")))
    with pytest.raises(DataError, match="the tokenizer that came with the model has sha256"):
        run(asked, Hooks(), torch.device("cpu"), Known())


def replace_tokenizer(graph: Path, contents: str) -> TracedModel:
    held = read_traced(graph)
    return TracedModel(held.graph, held.costs, tokenizer=contents)


def test_a_graph_without_a_tokenizer_is_as_it_was(tmp_path: Path) -> None:
    asked = assignment(tmp_path, TABLE)
    assert b"tokenizer" not in asked.graph.read_bytes()
    assert Model(replace_tokenizer(asked.graph, "").graph).graph.input_shape == (COLUMNS.features,)
