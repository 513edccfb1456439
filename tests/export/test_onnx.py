import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fedepth.models.split import split_spec
from torch import nn

import fedepth
from fedepth.errors import ExportError, ModelError, StateError
from fedepth.export import onnx as module
from fedepth.export.onnx import ExportReport, export
from fedepth.models.load import load_model
from fedepth.task import ModelSpec
from fedepth.weights import save

DIGITS = ModelSpec("digits-cnn", ("null", "eins", "zwölf"), (1, 8, 8), (0.3,), (0.25,))


def constant_model() -> nn.Module:
    """All logits are equal, for every image: nothing but ties."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


class DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 1e6 else x + 1e-9


def not_exportable() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), DataDependent(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def write_weights(spec: ModelSpec, path: Path) -> Path:
    torch.manual_seed(1)
    model = split_spec(spec, device="cpu").model
    with torch.no_grad():
        model.train()(torch.randn(8, *spec.input_shape))  # running statistics other than 0 and 1
    save(path, {name: tensor.numpy() for name, tensor in model.state_dict().items()})
    return path


def images_for(spec: ModelSpec, count: int) -> Any:
    return np.random.default_rng(0).standard_normal((count, *spec.input_shape)).astype(np.float32)


def run_export(spec: ModelSpec, folder: Path, images: Any, name: str = "model.onnx") -> ExportReport:
    weights = write_weights(spec, folder / "weights.safetensors")
    return export(spec, weights, folder / name, job="digits", round=7, weights_digest="abc123", images=images)


def test_the_export_gives_what_the_model_gives_at_any_batch_size(tmp_path: Path) -> None:
    images = images_for(DIGITS, 70)
    report = run_export(DIGITS, tmp_path, images)
    assert report.samples == 70
    assert report.top1_equal + report.ties == 70
    assert report.top1_equal > 0
    assert report.parity_max_abs <= 1e-5
    assert report.size_bytes == (tmp_path / "model.onnx").stat().st_size
    assert report.opset >= 18
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    model = load_model(DIGITS, tmp_path / "weights.safetensors").model
    for count in (1, 2, 5):
        with torch.no_grad():
            expected = model(torch.from_numpy(images[:count])).numpy()
        (found,) = session.run(["logits"], {"images": images[:count]})
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_batch_norm_is_exported_with_its_running_statistics(tmp_path: Path) -> None:
    spec = ModelSpec("preresnet20", ("a", "b"), (3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    report = run_export(spec, tmp_path, images_for(spec, 3))
    assert report.parity_max_abs <= 1e-4
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    images = images_for(spec, 3)
    (together,) = session.run(["logits"], {"images": images})
    (alone,) = session.run(["logits"], {"images": images[:1]})
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)


def test_the_file_explains_itself(tmp_path: Path) -> None:
    report = run_export(DIGITS, tmp_path, images_for(DIGITS, 2))
    told = {entry.key: entry.value for entry in onnx.load(report.path).metadata_props}
    assert json.loads(told["classes"]) == list(DIGITS.classes)
    assert json.loads(told["input_shape"]) == [1, 8, 8]
    assert (json.loads(told["mean"]), json.loads(told["std"])) == ([0.3], [0.25])
    assert (told["job"], told["round"], told["weights_digest"]) == ("digits", "7", "abc123")
    assert told["fedepth_version"] == fedepth.__version__


def test_equal_weights_give_equal_files(tmp_path: Path) -> None:
    images = images_for(DIGITS, 2)
    first = run_export(DIGITS, tmp_path, images, "first.onnx")
    second = run_export(DIGITS, tmp_path, images, "second.onnx")
    assert Path(first.path).read_bytes() == Path(second.path).read_bytes()


def test_torchs_chatter_stays_away(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_export(DIGITS, tmp_path, images_for(DIGITS, 2))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        ([2e-4, 0, 0], r"0\.0002 in a logit \(limit 0\.0001\)"),
        ([0, float("nan"), 0], "nan in a logit"),
    ],
)
def test_an_export_that_differs_is_refused_and_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: list[float], message: str
) -> None:
    def differing(model: nn.Module, data: bytes, images: Any) -> Any:
        expected = np.tile(np.float32([3, 1, 0]), (len(images), 1))
        return expected, expected + np.float32(offset)

    monkeypatch.setattr(module, "compare", differing)
    with pytest.raises(ExportError, match=message):
        run_export(DIGITS, tmp_path, images_for(DIGITS, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.safetensors"]


def logits_that_swap(gap: float) -> Any:
    """The first two classes change places, each by less than the limit if `gap` is small."""
    expected = np.float32([[1 + gap, 1, 0]])
    return expected, np.float32([[1 + gap / 2 - 1e-6, 1 + gap / 2 + 1e-6, 0]])


def test_close_logits_are_a_tie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compare", lambda *_: logits_that_swap(1.5e-4))
    report = run_export(DIGITS, tmp_path, images_for(DIGITS, 1))
    assert (report.ties, report.top1_equal, report.samples) == (1, 0, 1)
    assert report.parity_max_abs <= 1e-4


def test_another_class_is_refused_unless_tied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARITY_LIMIT", 1.0)  # so that only the classes can be the reason
    monkeypatch.setattr(module, "compare", lambda *_: logits_that_swap(4e-4))
    with pytest.raises(ExportError, match="first class of 1 of 1 images"):
        run_export(DIGITS, tmp_path, images_for(DIGITS, 1))


def test_equal_logits_everywhere_are_all_ties(tmp_path: Path) -> None:
    spec = ModelSpec(f"{__name__}:constant_model", ("a", "b", "c"), (1, 8, 8), (0.5,), (0.5,))
    report = run_export(spec, tmp_path, images_for(spec, 5))
    assert (report.ties, report.top1_equal) == (5, 0)


def test_a_model_that_torch_cannot_export_is_told(tmp_path: Path) -> None:
    spec = ModelSpec(f"{__name__}:not_exportable", ("a", "b", "c"), (1, 8, 8), (0.5,), (0.5,))
    with pytest.raises(ExportError, match="cannot export"):
        run_export(spec, tmp_path, images_for(spec, 2))
    assert not (tmp_path / "model.onnx").exists()


def test_an_export_needs_images(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no images"):
        run_export(DIGITS, tmp_path, images_for(DIGITS, 0))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    tensors = {n: t.numpy() for n, t in split_spec(DIGITS, device="cpu").model.state_dict().items()}
    save(path, {**tensors, "extra": np.zeros(1, np.float32)})
    with pytest.raises(ModelError, match="1 are missing or unknown, such as extra"):
        load_model(DIGITS, path)
    tensors.pop("head.2.bias")
    save(path, tensors)
    with pytest.raises(ModelError, match=r"such as head\.2\.bias"):
        load_model(DIGITS, path)
    with pytest.raises(StateError, match="no weights file"):
        load_model(DIGITS, tmp_path / "missing.safetensors")


def test_loaded_models_are_ready_to_be_asked(tmp_path: Path) -> None:
    spec = ModelSpec("preresnet20", ("a", "b"), (3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    weights = write_weights(spec, tmp_path / "weights.safetensors")
    model = load_model(spec, weights).model
    assert not any(m.training for m in model.modules())
    assert model.get_buffer("blocks.0.norm1.num_batches_tracked").item() == 1
    assert not any(parameter.requires_grad for parameter in model.parameters())
