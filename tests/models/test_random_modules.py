"""Modules that chance puts together, of what people write: every one is exact as a graph, and unit by unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedepth.models.export import export_model
from fedepth.models.graph import decode, encode
from fedepth.models.verify import TOLERANCE, verify
from fedepth.training.trial_step import try_one_step
from tests.models.module_and_graph import difference_of_steps

CHANNELS, SIDE, CLASSES = 4, 6, 10

Forward = Callable[["Layer", torch.Tensor], torch.Tensor]


class Layer(nn.Module):
    """One of `KINDS`, with everything that any of them may need."""

    def __init__(self, kind: str, frozen: bool) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm: nn.Module = nn.BatchNorm2d(CHANNELS) if kind == "batch_norm" else nn.GroupNorm(2, CHANNELS)
        self.layer_norm = nn.LayerNorm(CHANNELS)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, CHANNELS).view(-1, 1, 1), persistent=False)
        self.plain = torch.full((1, CHANNELS, 1, 1), 0.25)
        self.requires_grad_(not frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return KINDS[self.kind](self, x)


def residual_in_place(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    y = layer.conv(x)
    y += x
    return F.relu_(y)


def slices(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    y = x * layer.scale
    y[:, :2] = y[:, :2] * 2
    y[:, 2:].mul_(0.5)
    return y


def counted(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """A buffer that training writes."""
    if layer.training:
        layer.calls.add_(1)
    return x * (1 + 0.1 * layer.calls)


def mode(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-2, 2) + layer.plain if layer.training else F.relu6(x)


def depth(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Stochastic depth: of each sample the branch is kept or not."""
    if not layer.training:
        return x + layer.conv(x)
    kept = torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 0.7))
    return x + layer.conv(x) * kept / 0.7


def attention(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=0.1 if layer.training else 0.0)
    return layer.layer_norm(mixed + tokens).transpose(1, 2).reshape(x.shape)


def halves(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    one, other = x.chunk(2, 1)
    return torch.cat([other, one * torch.sigmoid(other)], 1)


KINDS: dict[str, Forward] = {
    "conv": lambda layer, x: layer.conv(x),
    "conv_relu_": lambda layer, x: F.relu(layer.conv(x), inplace=True),
    "batch_norm": lambda layer, x: F.hardswish(layer.norm(layer.conv(x)), inplace=True),
    "group_norm": lambda layer, x: F.leaky_relu_(layer.norm(layer.conv(x)), 0.1),
    "activation_first": lambda layer, x: layer.conv(F.relu_(x * 1.0)),
    "channels_behind": lambda layer, x: layer.layer_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "dropout": lambda layer, x: F.dropout(x, 0.3, layer.training),
    "noise": lambda layer, x: x + 0.1 * torch.randn_like(x) if layer.training else x,
    "view": lambda layer, x: (layer.conv(x).contiguous().view(x.size(0), -1) * 1.5).view(-1, CHANNELS, *x.shape[2:]),
    "gate": lambda layer, x: x * torch.sigmoid(layer.conv(x).mean((2, 3), keepdim=True)),
    "residual_in_place": residual_in_place,
    "slices": slices,
    "counted": counted,
    "mode": mode,
    "depth": depth,
    "attention": attention,
    "halves": halves,
}


@dataclass(frozen=True)
class Recipe:
    """Layers as (kind, frozen, the earlier layer whose convolution it shares or -1), and how the head pools."""

    layers: tuple[tuple[str, bool, int], ...]
    flat: bool


recipes = st.builds(
    Recipe,
    st.lists(
        st.tuples(st.sampled_from(sorted(KINDS)), st.sampled_from((False, False, True)), st.integers(-6, 3)),
        min_size=2,
        max_size=6,
    ).map(tuple),
    st.booleans(),
)


class Drawn(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.flat = recipe.flat
        self.stem = nn.Conv2d(2, CHANNELS, 3, padding=1)
        self.layers = nn.ModuleList(Layer(kind, frozen) for kind, frozen, _ in recipe.layers)
        for at, (_, _, other) in enumerate(recipe.layers):
            if 0 <= other < at:
                self.layers[at].conv.weight = self.layers[other].conv.weight
        self.head = nn.Linear(CHANNELS * SIDE * SIDE if recipe.flat else CHANNELS, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.reshape(x.shape[0], -1) if self.flat else x.mean((2, 3)))  # type: ignore[no-any-return]


@given(recipes)
# Without shrinking: a recipe is short, and an export takes half a second.
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
def test_any_module_is_exact_as_a_graph(recipe: Recipe) -> None:
    torch.manual_seed(1)
    module = Drawn(recipe)
    exported = export_model(module, "drawn", (2, SIDE, SIDE), "F32", CLASSES)
    assert decode(encode(exported.graph)) == exported.graph
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    assert not frozen & exported.graph.layout().by_name.keys()
    assert verify(module, exported, "drawn") <= TOLERANCE / 10
    for training in (True, False):
        for batch in (2, 7):
            assert difference_of_steps(module, exported, batch, training=training) <= TOLERANCE / 10
    # Unit by unit, with and without checkpointing, in the layout of a trainer: raises ModelError where it differs.
    try_one_step(exported.graph, exported.tensors, exported.examples(3))
