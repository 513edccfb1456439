import errno
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import fedepth
from fedepth.data.transforms import model_inputs
from fedepth.errors import DiskError, ExportError, ModelError, StateError
from fedepth.export import onnx as module
from fedepth.export.onnx import ExportReport, export, random_samples
from fedepth.job_sections import ExportSection
from fedepth.models import zoo
from fedepth.models.export import Exported, export_model
from fedepth.models.load import load_model
from fedepth.models.run import Model
from fedepth.task import InputType, ModelSpec
from fedepth.weights import save

DIGITS = ModelSpec("digits-cnn", ("null", "eins", "zwölf"), (1, 8, 8), (0.3,), (0.25,))


def constant_model() -> nn.Module:
    """All logits are equal, for every image: nothing but ties."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


class Words(nn.Module):
    """Token ids to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.mix = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(torch.relu(self.mix(self.embedding(ids))).mean(1))
        return logits


@functools.cache
def exported(spec: ModelSpec) -> Exported:
    torch.manual_seed(1)
    module = zoo.build(spec)
    return export_model(module, spec.name, spec.input_shape, spec.input_type.dtype, len(spec.classes))


@pytest.fixture(autouse=True)
def traced_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes seconds for a model: it is asked once for each, but where its own work is looked at."""
    if "torch_itself" not in request.fixturenames:
        monkeypatch.setattr(module, "_traced", traced)


@pytest.fixture
def torch_itself() -> None:
    """For tests that look at what torch does."""


_TRACED: dict[str, Any] = {}
_trace = module._traced


def traced(model: Model, spec: ModelSpec, choices: ExportSection, opsets: tuple[int, ...]) -> Any:
    copy = onnx.ModelProto()
    if spec.name not in _TRACED:
        _TRACED[spec.name] = _trace(model, spec, choices, opsets)
    copy.CopyFrom(_TRACED[spec.name])
    return copy


def write_weights(spec: ModelSpec, path: Path) -> Path:
    tensors = {name: tensor.detach().clone() for name, tensor in exported(spec).tensors.items()}
    model = Model(exported(spec).graph)
    model.load(tensors.__getitem__)
    torch.manual_seed(1)
    with torch.no_grad():
        model(torch.from_numpy(model_inputs(samples_for(spec, 8), spec)))  # running statistics other than 0 and 1
    save(path, {name: tensor.numpy() for name, tensor in tensors.items()})
    return path


def samples_for(spec: ModelSpec, count: int) -> Any:
    return random_samples(spec, exported(spec).graph, count)


def run_export(spec: ModelSpec, folder: Path, samples: Any, name: str = "model.onnx", **choices: Any) -> ExportReport:
    weights, graph = write_weights(spec, folder / "weights.safetensors"), exported(spec).graph
    told = {"job": "digits", "round": 7, "weights_digest": "abc123", "choices": ExportSection(**choices)}
    return export(spec, graph, weights, folder / name, samples=samples, **told)


def test_the_export_gives_what_the_model_gives_at_any_batch_size(tmp_path: Path) -> None:
    samples = samples_for(DIGITS, 70)
    report, images = run_export(DIGITS, tmp_path, samples), model_inputs(samples, DIGITS)
    assert report.samples == 70
    assert report.top1_equal + report.ties == 70
    assert report.top1_equal > 0
    assert report.parity_max_abs <= 1e-5
    assert report.size_bytes == (tmp_path / "model.onnx").stat().st_size
    assert (report.opset, report.ir_version) == (14, 7)
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    model = load_model(exported(DIGITS).graph, tmp_path / "weights.safetensors")
    for count in (1, 2, 5):
        with torch.no_grad():
            expected = model(torch.from_numpy(images[:count])).numpy()
        (found,) = session.run(["logits"], {"images": images[:count]})
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_batch_norm_is_exported_with_its_running_statistics(tmp_path: Path) -> None:
    spec = ModelSpec("preresnet20", ("a", "b"), (3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    report = run_export(spec, tmp_path, samples_for(spec, 3))
    assert report.parity_max_abs <= 1e-4
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    images = model_inputs(samples_for(spec, 3), spec)
    (together,) = session.run(["logits"], {"images": images})
    (alone,) = session.run(["logits"], {"images": images[:1]})
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)


def test_the_file_explains_itself(tmp_path: Path) -> None:
    report = run_export(DIGITS, tmp_path, samples_for(DIGITS, 2))
    told = {entry.key: entry.value for entry in onnx.load(report.path).metadata_props}
    assert json.loads(told["classes"]) == list(DIGITS.classes)
    assert json.loads(told["input_shape"]) == [1, 8, 8]
    assert (json.loads(told["mean"]), json.loads(told["std"])) == ([0.3], [0.25])
    assert (told["job"], told["round"], told["weights_digest"]) == ("digits", "7", "abc123")
    assert told["fedepth_version"] == fedepth.__version__


def test_equal_weights_give_equal_files(tmp_path: Path, torch_itself: None) -> None:
    images = samples_for(DIGITS, 2)
    first = run_export(DIGITS, tmp_path, images, "first.onnx")
    second = run_export(DIGITS, tmp_path, images, "second.onnx")
    assert Path(first.path).read_bytes() == Path(second.path).read_bytes()


def test_torchs_chatter_stays_away(tmp_path: Path, capfd: pytest.CaptureFixture[str], torch_itself: None) -> None:
    run_export(DIGITS, tmp_path, samples_for(DIGITS, 2))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        ([2e-4, 0, 0], r"0\.0002 in a logit \(limit 0\.0001\)"),
        ([0, float("nan"), 0], "nan in a logit"),
        ([0, float("inf"), 0], "inf in a logit"),
    ],
)
def test_an_export_that_differs_is_refused_and_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: list[float], message: str
) -> None:
    def differing(model: nn.Module, data: bytes, samples: Any, *_: Any) -> Any:
        expected = np.tile(np.float32([3, 1, 0]), (len(samples), 1))
        return expected, expected + np.float32(offset)

    monkeypatch.setattr(module, "compare", differing)
    with pytest.raises(ExportError, match=message):
        run_export(DIGITS, tmp_path, samples_for(DIGITS, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.safetensors"]


def test_an_export_that_cannot_be_written_is_an_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(module, "write_atomically", full)
    with pytest.raises(DiskError, match=r"\.onnx cannot be written: .*No space left on device"):
        run_export(DIGITS, tmp_path, samples_for(DIGITS, 4))


def test_large_logits_are_compared_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # float32 has no number between 500 and 500.00003, and a hundred layers round.
    expected = np.float32([[500, -300, 0], [3, 1, 0]])
    monkeypatch.setattr(module, "compare", lambda *_: (expected, expected + np.float32([[4e-3, 0, 0], [0, 0, 0]])))
    report = run_export(DIGITS, tmp_path, samples_for(DIGITS, 2))
    assert report.parity_max_abs == pytest.approx(4e-3, rel=0.01)
    monkeypatch.setattr(module, "compare", lambda *_: (expected, expected + np.float32([[0, 0, 0], [4e-3, 0, 0]])))
    with pytest.raises(ExportError, match=r"0\.004 in a logit \(limit 0\.0001\)"):  # the other input's is no excuse
        run_export(DIGITS, tmp_path, samples_for(DIGITS, 2))


def logits_that_swap(gap: float) -> Any:
    """The first two classes change places, each by less than the limit if `gap` is small."""
    expected = np.float32([[1 + gap, 1, 0]])
    return expected, np.float32([[1 + gap / 2 - 1e-6, 1 + gap / 2 + 1e-6, 0]])


def test_close_logits_are_a_tie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compare", lambda *_: logits_that_swap(1.5e-4))
    report = run_export(DIGITS, tmp_path, samples_for(DIGITS, 1))
    assert (report.ties, report.top1_equal, report.samples) == (1, 0, 1)
    assert report.parity_max_abs <= 1e-4


def test_another_class_is_refused_unless_tied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each logit is off by less than the limit, and yet they were further apart than that can explain.
    swapped = np.float32([[1 + 2.1e-4, 1, 0]]), np.float32([[1 + 1.1e-4, 1 + 1e-4 + 1.5e-5, 0]])
    monkeypatch.setattr(module, "compare", lambda *_: swapped)
    with pytest.raises(ExportError, match="top class for 1 of 1 inputs"):
        run_export(DIGITS, tmp_path, samples_for(DIGITS, 1))


def test_equal_logits_everywhere_are_all_ties(tmp_path: Path) -> None:
    spec = ModelSpec(f"{__name__}:constant_model", ("a", "b", "c"), (1, 8, 8), (0.5,), (0.5,))
    report = run_export(spec, tmp_path, samples_for(spec, 5))
    assert (report.ties, report.top1_equal) == (5, 0)


def test_token_ids_are_exported_as_such(tmp_path: Path) -> None:
    spec = ModelSpec(f"{__name__}:Words", ("a", "b", "c"), (6,), (0.0,), (1.0,), InputType.TOKENS)
    report = run_export(spec, tmp_path, samples_for(spec, 9))
    assert report.samples == 9
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == "tensor(int64)"


def test_an_export_needs_images(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no inputs"):
        run_export(DIGITS, tmp_path, samples_for(DIGITS, 0))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path, graph = tmp_path / "other.safetensors", exported(DIGITS).graph
    tensors = {name: tensor.detach().numpy() for name, tensor in exported(DIGITS).tensors.items()}
    save(path, {**tensors, "extra": np.zeros(1, np.float32)})
    with pytest.raises(ModelError, match="1 are missing or unknown, such as extra"):
        load_model(graph, path)
    save(path, {**tensors, "head.2.bias": np.zeros(4, np.float32)})
    with pytest.raises(ModelError, match=r"holds head\.2\.bias as \('F32', \(4,\)\), the model as"):
        load_model(graph, path)
    tensors.pop("head.2.bias")
    save(path, tensors)
    with pytest.raises(ModelError, match=r"such as head\.2\.bias"):
        load_model(graph, path)
    with pytest.raises(StateError, match="no weights file"):
        load_model(graph, tmp_path / "missing.safetensors")


def test_loaded_models_are_ready_to_be_asked(tmp_path: Path) -> None:
    spec = ModelSpec("preresnet20", ("a", "b"), (3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    weights = write_weights(spec, tmp_path / "weights.safetensors")
    model = load_model(exported(spec).graph, weights)
    units = (*model.units, model.head)
    assert not any(unit.training for unit in units)
    assert model.units[1].tensors["blocks.0.norm1.num_batches_tracked"].item() == 1
    assert not any(tensor.requires_grad for unit in units for tensor in unit.tensors.values())
