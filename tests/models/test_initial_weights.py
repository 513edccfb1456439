"""Weights that a job begins with."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedepth.errors import ModelError
from fedepth.models.initial_weights import classifier, load_initial_weights
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


class Transformer(nn.Module):
    """Tensors named and shaped as torchvision names a Vision Transformer's."""

    def __init__(self, classes: int = 3, *, side: int = 4, layers: int = 4, width: int = 6, patch: int = 2) -> None:
        super().__init__()
        torch.manual_seed(side)
        self.conv_proj = nn.Conv2d(1, width, patch, patch)
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.randn(1, 1 + side * side, width))
        self.encoder.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, classes)


def saved(folder: Path, module: nn.Module, **changes: torch.Tensor) -> Path:
    torch.save({**module.state_dict(), **changes}, folder / "w.pt")
    return folder / "w.pt"


def refused(folder: Path, module: nn.Module, given: nn.Module, says: str, **changes: torch.Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ModelError, match=says):
        load_initial_weights(module, saved(folder, given, **changes), 3)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_position_embeddings_are_interpolated_to_another_grid(tmp_path: Path) -> None:
    given, fresh = Transformer(side=8), Transformer(side=4)
    with torch.no_grad():  # a value for every row, which stays one however it is interpolated
        grid = torch.arange(8.0).repeat_interleave(8)
        given.encoder.pos_embedding[0, 1:] = grid[:, None]  # type: ignore[index]
    notes = load_initial_weights(fresh, saved(tmp_path, given), 3)
    assert "position embeddings were interpolated: encoder.pos_embedding from 8×8 to 4×4 patches" in notes
    got = fresh.encoder.pos_embedding[0].detach()  # type: ignore[index,operator]
    assert torch.equal(got[0], given.encoder.pos_embedding[0, 0])  # type: ignore[index]
    rows = got[1:].reshape(4, 4, 6)
    torch.testing.assert_close(rows, rows[:, :1, :1].expand(4, 4, 6))
    torch.testing.assert_close(rows[:, 0, 0].flip(0), 7 - rows[:, 0, 0])
    assert torch.all(rows[1:, 0, 0] > rows[:-1, 0, 0])


def test_positions_of_the_same_grid_stay_to_the_bit(tmp_path: Path) -> None:
    given, fresh = Transformer(side=4), Transformer(side=4)
    with torch.no_grad():
        given.encoder.pos_embedding.mul_(3.0)  # type: ignore[operator]
    assert len(load_initial_weights(fresh, saved(tmp_path, given), 3)) == 1
    assert torch.equal(fresh.encoder.pos_embedding, given.encoder.pos_embedding)  # type: ignore[arg-type]


def test_what_is_no_square_grid_or_has_other_widths_is_refused_with_both_shapes(tmp_path: Path) -> None:
    own = Transformer()
    says = r"encoder\.pos_embedding has the shape \(1, 13, 6\), the model's \(1, 17, 6\)"
    refused(tmp_path, own, own, says, **{"encoder.pos_embedding": torch.zeros(1, 13, 6)})
    refused(tmp_path, own, Transformer(width=8), r"conv_proj\.weight has the shape \(8, 1, 2, 2\), the model's \(6, 1,")
    says = r"conv_proj\.weight has the shape \(6, 1, 4, 4\), the model's \(6, 1, 2, 2\)"
    refused(tmp_path, own, Transformer(patch=4), says)


def test_fewer_or_more_layers_than_the_model_has_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, Transformer(), Transformer(layers=2), r"encoder\.layers\.2\.weight is missing")
    refused(
        tmp_path, Transformer(), Transformer(layers=6), r"encoder\.layers\.4\.bias is of a layer that the model has"
    )


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    changes = {"encoder.layers.1.bias": torch.tensor([0.0, float("nan"), 0, 0, 0, 0])}
    refused(tmp_path, Transformer(), Transformer(), r"not finite numbers: encoder\.layers\.1\.bias", **changes)


def test_numbers_of_another_kind_are_refused(tmp_path: Path) -> None:
    changes = {"encoder.layers.1.bias": torch.zeros(6, dtype=torch.int64)}
    refused(tmp_path, Transformer(), Transformer(), r"layers\.1\.bias is of type torch\.int64, the model's", **changes)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.module.", "net.backbone."])
def test_what_stands_in_front_of_all_names_is_left_out(tmp_path: Path, prefix: str) -> None:
    given, fresh = Transformer(side=5), Transformer(side=5)
    with torch.no_grad():
        given.head.weight.fill_(2.0)
    state = {f"{prefix}{name}": tensor for name, tensor in given.state_dict().items()}
    torch.save({"state_dict": {**state, "loss.weight": torch.ones(3)}}, tmp_path / "w.pt")
    notes = load_initial_weights(fresh, tmp_path / "w.pt", 3)
    assert notes == (
        f"13 tensors of w.pt are the initial weights, named {prefix}…",
        "1 tensors of the file are not in the model: loss.weight",
    )
    assert torch.equal(fresh.head.weight, given.head.weight)


def test_two_models_in_one_file_are_refused(tmp_path: Path) -> None:
    state = {f"{owner}.{name}": t for owner in ("student", "teacher") for name, t in Transformer().state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"holds the model twice, under student\. and teacher\."):
        load_initial_weights(Transformer(), tmp_path / "w.pt", 3)


@pytest.mark.parametrize("case", ["asked for", "missing", "of another shape"])
def test_a_new_classifier_keeps_its_fresh_weights_and_is_said_once(tmp_path: Path, case: str) -> None:
    given, fresh = Transformer(), Transformer()
    with torch.no_grad():
        given.head.weight.fill_(2.0)
    state = given.state_dict()
    if case == "missing":
        del state["head.weight"], state["head.bias"]
    if case == "of another shape":
        state["head.weight"], state["head.bias"] = torch.zeros(7, 9), torch.zeros(7)
    torch.save(state, tmp_path / "w.pt")
    kept = fresh.head.weight.detach().clone()
    notes = load_initial_weights(fresh, tmp_path / "w.pt", 3, new_classifier=case == "asked for")
    assert [note for note in notes if "classifier" in note] == [
        "a new classifier for 3 classes: head.bias, head.weight keep fresh weights"
    ]
    assert torch.equal(fresh.head.weight, kept)


def test_a_new_classifier_that_cannot_be_told_is_refused(tmp_path: Path) -> None:
    """It would keep the weights of the file, and nobody would know."""
    given = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    torch.save(given.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"\[tuning\] new_classifier: .* each of 3 classes; assign it last"):
        load_initial_weights(nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)), tmp_path / "w.pt", 3, new_classifier=True)


def test_only_the_last_layer_is_the_classifier() -> None:
    """Though others give as many values: a norm before it, and a layer with as many outputs as classes."""
    module = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    assert classifier(module, 3) == {"2.weight", "2.bias"}
    assert classifier(nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)), 3) == frozenset()
    assert classifier(Transformer(), 4) == frozenset()
    distilled = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 3))
    assert classifier(distilled, 3) == {"1.weight", "1.bias", "2.weight", "2.bias"}


def test_a_classifier_of_another_model_that_misses_more_is_refused(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(4, 1, 3, 3)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"conv_proj\.weight is missing"):
        load_initial_weights(Transformer(), tmp_path / "w.pt", 3)


def test_why_a_file_is_no_checkpoint_is_said_in_a_sentence_of_ours(tmp_path: Path) -> None:
    whole, other = tmp_path / "whole.pt", tmp_path / "other.pt"
    torch.save(torch.nn.Linear(2, 2), whole)
    other.write_bytes(b"hello" * 100)
    for path, words in ((whole, "objects of Python, such as a whole model, whose code is not run"), (other, "damaged")):
        with pytest.raises(ModelError) as caught:
            load_initial_weights(torch.nn.Linear(2, 2), path, 2, new_classifier=False)
        assert words in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch's, of what that costs
@pytest.mark.parametrize("odd", [torch.eye(2).to_sparse(), torch.empty(2, 2, device="meta")])
def test_tensors_without_plain_values_are_refused(odd: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"weight": odd, "bias": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"sparse or without values \(meta\): weight; save them as plain ones"):
        load_initial_weights(torch.nn.Linear(2, 2), tmp_path / "w.pt", 2)
