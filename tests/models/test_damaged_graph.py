"""A graph comes from the network: whatever is wrong with it ends in a ModelError, or it is a graph like another."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedepth.errors import DataError, ModelError
from fedepth.models.export import export_model
from fedepth.models.graph import decode, encode
from fedepth.models.run import Model


class Small(nn.Module):
    """Every kind of argument: values, tensors, sizes that grow with the batch, types, lists."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device).unsqueeze(0).expand(x.shape[0], -1)
        tokens = self.norm(self.words(x) + self.words(places).to(torch.float32))
        return self.head(torch.cat([tokens, tokens * float("-inf").__neg__() * 0 + 1], 1).nan_to_num().mean(1))  # type: ignore[no-any-return]


def small() -> bytes:
    torch.manual_seed(0)
    return encode(export_model(Small(), "small", (5,), "I64", 3).graph)


GRAPH = small()
others = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of everything in a JSON document."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


PLACES = places(json.loads(GRAPH))[1:]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_changed_is_refused_or_still_a_graph(data: st.DataObject) -> None:
    document = json.loads(GRAPH)
    for _ in range(data.draw(st.integers(1, 3))):
        *way, key = data.draw(st.sampled_from(PLACES))
        node = document
        try:
            for step in way:
                node = node[step]
            known = [place for place in PLACES if place != (*way, key)]
            if data.draw(st.booleans()):
                node[key] = data.draw(others)
            else:  # something that stands elsewhere in it
                value: Any = json.loads(GRAPH)
                for step in data.draw(st.sampled_from(known)):
                    value = value[step]
                node[key] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change has taken that place away
    try:
        Model(decode(json.dumps(document).encode()))
    except ModelError as error:
        assert len(str(error)) < 500


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(GRAPH) - 1), st.binary(max_size=3), st.integers(0, 20))
def test_damaged_bytes_are_refused_or_still_a_graph(at: int, put: bytes, lost: int) -> None:
    try:
        Model(decode(GRAPH[:at] + put + GRAPH[at + lost :]))
    except ModelError as error:
        assert len(str(error)) < 500


def test_an_id_that_an_embedding_has_not_is_the_datas_fault() -> None:
    model = Model(decode(GRAPH))
    model.load(lambda name: torch.ones(model.graph.tensors[name][1]))
    with pytest.raises(DataError, match="unit words: an input holds an id"):
        model(torch.tensor([[0, 1, 2, 3, 12]]))
