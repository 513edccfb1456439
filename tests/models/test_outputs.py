"""Which output is taken for the logits, and models that cannot be exported, in one sentence each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from fedepth.errors import ModelError
from fedepth.models.export import Exported, export_model
from fedepth.models.outputs import logits_of
from fedepth.models.verify import verify


@dataclass
class Found:
    features: torch.Tensor
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Pair(NamedTuple):
    features: torch.Tensor
    logits: torch.Tensor


class Holder:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class Returning(nn.Module):
    """A linear classifier that returns what `form` makes of its logits and its features."""

    def __init__(self, form: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.form = form
        self.first, self.classifier = nn.Linear(6, 8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.first(x).relu()
        return self.form(self.classifier(x), x)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.classifier = nn.Linear(8, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        lengths = (ids != 0).sum(1).clamp(min=1)
        x = self.embedding(ids)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, last = self.gru(packed)
        return self.classifier(last[-1])  # type: ignore[no-any-return]


def exported(module: nn.Module) -> Exported:
    torch.manual_seed(0)
    return export_model(module, "returning", (6,), "F32", 10)


@pytest.mark.parametrize(
    ("form", "note"),
    [
        (lambda logits, x: Found(x, logits), "one named logits or out"),
        (lambda logits, x: Pair(x, logits), "one named logits or out"),
        (lambda logits, x: {"features": x, "logits": logits}, "one named logits or out"),
        (lambda logits, x: {"features": x, "out": logits}, "one named logits or out"),
        (lambda logits, x: (logits, x), "first"),
        (lambda logits, x: {"name": "text", "logits": logits}, ""),
        (lambda logits, x: [[logits]], ""),
    ],
    ids=["dataclass", "named tuple", "dict", "out", "tuple", "text", "lists"],
)
def test_logits_are_found_among_outputs(form: Any, note: str) -> None:
    module = Returning(form)
    found = exported(module)
    assert verify(module, found, "returning") == 0.0
    assert [note] * bool(note) == [
        re.sub(r".*the model the (.*) is taken;.*", r"\1", each) for each in found.graph.notes
    ]


def test_logits_of_what_holds_no_tensor() -> None:
    assert logits_of({"logits": None, "name": "text"}) is None
    assert logits_of(None) is None


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            Returning(lambda logits, x: Holder(logits)),
            r"returns a tests\.models\.test_outputs\.Holder; return the tensor",
        ),
        (Returning(lambda logits, x: None), "returns no tensor"),
        (
            Returning(lambda logits, x: torch.vmap(torch.cumsum, in_dims=(0, None))(logits, 0)),
            r"vmap or torch\.func at",
        ),
        (Returning(lambda logits, x: torch.func.grad(lambda t: t.pow(3).sum())(logits)), r"vmap or torch\.func at"),
        (Returning(lambda logits, x: logits @ logits), "torch says: .{5,200};"),
    ],
    ids=["object", "nothing", "vmap", "grad", "shapes"],
)
def test_a_refusal_is_one_sentence(module: nn.Module, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        exported(module)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_packed_sequences_are_named() -> None:
    with pytest.raises(ModelError, match=r"test_outputs\.py.*it packs sequences"):
        export_model(Packed(), "packed", (6,), "I64", 10)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_modules_that_torch_jit_has_compiled_are_named_and_traced_parts_are_kept() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10))
    example = torch.randn(2, 6)
    for compiled in (torch.jit.script(module), torch.jit.trace(module, example)):
        with pytest.raises(ModelError, match=r"has been compiled by torch\.jit"):
            exported(compiled)
    with pytest.raises(ModelError, match=r"compiled by torch\.jit in 0,"):
        exported(nn.Sequential(torch.jit.script(module[0]), nn.Linear(8, 10)))
    partly = nn.Sequential(torch.jit.trace(module[0], example), nn.Linear(8, 10))
    assert verify(partly, exported(partly), "traced") == 0.0
