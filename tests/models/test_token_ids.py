"""Token ids that a model is tried with: all that it has rows for, and no others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedepth.errors import ModelError
from fedepth.models.export import Exported, example_inputs, export_model
from fedepth.models.verify import verify
from fedepth.prepare import check_vocabulary
from fedepth.task import InputType, ModelSpec, TextSpec

Look = Callable[["Reader", torch.Tensor], torch.Tensor]


class Reader(nn.Module):
    """Ids (B, 5) to logits, by some way to look them up: in a table of 12 rows, or in an embedding of 20."""

    def __init__(self, look: Look) -> None:
        super().__init__()
        self.look = look
        self.table = nn.Parameter(torch.randn(12, 8))
        self.embedding = nn.Embedding(20, 8)
        self.classifier = nn.Linear(8, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.look(self, ids).mean(1))  # type: ignore[no-any-return]


def exported(look: Look) -> tuple[nn.Module, Exported]:
    torch.manual_seed(0)
    module = Reader(look)
    return module, export_model(module, "reader", (5,), "I64", 10)


@pytest.mark.parametrize(
    ("look", "largest"),
    [
        (lambda m, ids: m.table[ids], 11),
        (lambda m, ids: m.embedding(ids), 19),
        (lambda m, ids: m.embedding(ids) + m.table[ids.view(-1)].view(-1, 5, 8), 11),
        (lambda m, ids: m.embedding(ids + 2), 17),
        (lambda m, ids: m.table.index_select(0, ids.flatten()).view(-1, 5, 8), 11),
        (lambda m, ids: F.one_hot(ids, 12).float() @ m.table, 11),
        (lambda m, ids: m.table.expand(ids.shape[0], 12, 8).gather(1, ids.unsqueeze(-1).expand(-1, -1, 8)), 11),
        (lambda m, ids: m.table[ids % 12], 7),  # any id would do
        (lambda m, ids: m.embedding(ids) + m.table[ids % 12], 19),
    ],
    ids=["table", "embedding", "both", "shifted", "index_select", "one_hot", "gather", "remainder", "both, computed"],
)
def test_ids_are_drawn_over_the_whole_range(look: Look, largest: int) -> None:
    module, found = exported(look)
    assert found.largest_id == largest
    assert int(found.examples(3).max()) == largest
    assert verify(module, found, "reader") == 0.0


def test_a_vocabulary_for_which_a_table_has_no_rows_is_refused_at_once() -> None:
    """Most words of a device may have small ids: it would train, and another one fail."""
    _, found = exported(lambda m, ids: m.table[ids])
    spec = ModelSpec("reader", ("a", "b"), (5,), (), (), InputType.TOKENS, text=TextSpec("label", ("text",), 12))
    check_vocabulary(found.graph, spec)
    spec = replace(spec, text=TextSpec("label", ("text",), 13))
    with pytest.raises(ModelError, match=r"12 rows for token ids, .* ids below 13; set \[text\] vocabulary to 12"):
        check_vocabulary(found.graph, spec)
    check_vocabulary(exported(lambda m, ids: m.table[ids % 12])[1].graph, spec)  # it takes any id


@pytest.mark.parametrize(
    "look",
    [
        lambda m, ids: m.table[ids * 3],
        lambda m, ids: m.embedding(ids * 3),
        lambda m, ids: m.table[None].expand(ids.shape[0], 12, 8).gather(1, (ids * 3)[..., None].expand(-1, -1, 8)),
        lambda m, ids: F.one_hot(ids * 3, 12).float() @ m.table,
    ],
    ids=["table", "embedding", "gather", "one_hot"],
)
def test_a_table_that_is_too_small_is_named_with_what_was_tried(look: Look) -> None:
    with pytest.raises(ModelError, match=r"has no row for an id at .*test_token_ids\.py.*ids from 0 to 7 were tried"):
        exported(look)


def test_small_ids_are_common_and_the_largest_is_there() -> None:
    ids = example_inputs((50,), "I64", 9999, 4)
    assert int(ids.max()) == 9999 and int(ids.min()) == 0
    assert 60 < int((ids < 8).sum()) < 140
