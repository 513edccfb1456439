"""Weights that a job begins with."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedepth.errors import ModelError
from fedepth.models.initial_weights import load_initial_weights
from fedepth.weights import save


def model(classes: int = 3) -> nn.Module:
    torch.manual_seed(classes)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes))


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_of_another_precision_become_float32(tmp_path: Path, suffix: str, kind: str) -> None:
    dtype = getattr(torch, kind)
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model().state_dict().items()
    }
    path = tmp_path / f"weights.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    fresh = model()
    load_initial_weights(fresh, path, 3)
    for name, tensor in fresh.state_dict().items():
        assert tensor.dtype == (torch.float32 if tensor.is_floating_point() else torch.int64)
        assert torch.equal(tensor.to(state[name].dtype), state[name])


@pytest.mark.parametrize("form", ["safetensors", "plain", "nested", "wrapped"])
def test_every_form_of_checkpoint_is_read(tmp_path: Path, form: str) -> None:
    given = model()
    with torch.no_grad():
        given[0].weight.fill_(0.5)  # type: ignore[index]
    state = given.state_dict()
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    if form == "safetensors":
        save(path, {name: tensor.numpy() for name, tensor in state.items()})
    elif form == "plain":
        torch.save(state, path)
    elif form == "nested":
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    fresh = model()
    (note,) = load_initial_weights(fresh, path, 3)
    named = ", named module.…" if form == "wrapped" else ""
    assert note == f"{len(state)} tensors of {path.name} are the initial weights{named}"
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_classifier_for_other_classes_stays_fresh(tmp_path: Path) -> None:
    torch.save(model(7).state_dict(), tmp_path / "w.pt")
    fresh = model(3)
    classifier = fresh[3].weight.detach().clone()  # type: ignore[index]
    notes = load_initial_weights(fresh, tmp_path / "w.pt", 3)
    assert "a new classifier for 3 classes: 3.bias, 3.weight keep fresh weights" in notes
    assert torch.equal(fresh[3].weight, classifier)  # type: ignore[index]
    assert torch.equal(fresh[0].weight, model(7)[0].weight)  # type: ignore[index]


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    state = model().state_dict()
    state["0.weight"] = torch.zeros(5, 1, 3, 3)
    del state["1.bias"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"0\.weight has the shape \(5, 1, 3, 3\), the model's .*; 1\.bias is missing"):
        load_initial_weights(model(), tmp_path / "w.pt", 3)


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    with pytest.raises(ModelError, match="cannot be read as a checkpoint of tensors"):
        load_initial_weights(model(), tmp_path / "w.pt", 3)
    assert "executed" not in capsys.readouterr().out


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no weights file"):
        load_initial_weights(model(), tmp_path / "none.pt", 3)
