from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedepth.errors import ModelError
from fedepth.models import zoo
from fedepth.models.discover import discover_pattern
from fedepth.models.patterns import pattern_for
from fedepth.models.split import split
from fedepth.task import ModelSpec

SHAPE = (3, 8, 8)


class Listed(nn.Module):
    """A ModuleList and functions that the rule knows how to write as glue."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)])
        self.classifier = nn.Linear(6 * 64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        logits: torch.Tensor = self.classifier(x.flatten(1))
        return logits


class OtherOrder(nn.Module):
    """Children that were assigned in another order than they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 5)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.second = nn.Conv2d(4, 6, 3)
        self.first = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.first(x))
        x = self.relu(self.second(x))
        logits: torch.Tensor = self.head(torch.flatten(self.pool(x), 1))
        return logits


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Flatten(2), nn.Linear(64, 16), nn.LayerNorm(16))
        self.mix = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.mix(self.embed(x)))
        return logits


class LongSkip(Listed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.convs[0](x)
        x = self.convs[1](first) + first.mean()
        logits: torch.Tensor = self.classifier(x.flatten(1))
        return logits


class Twice(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.same(self.same(x)))


class Unused(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Scaled(Listed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.head = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2)
        logits: torch.Tensor = self.head(self.attention(tokens, tokens, tokens)[0].mean(dim=1))
        return logits


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        nn.Conv2d(4, 6, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(6, 5),
    )


def convolutional_classifier() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("build", [Listed, OtherOrder, Tokens, plain, convolutional_classifier])
def test_the_composition_is_the_model(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(split(model, "mine", SHAPE)(x), model(x))


def test_containers_are_opened_and_norms_join_their_unit() -> None:
    pattern = discover_pattern(plain(), "plain", SHAPE)
    assert pattern.units == (("0.0", "0.1", "0.2", "0.3"), ("1",))
    assert pattern.head == ("2", "3", "4", "5", "6", "7")


def test_functions_between_children_become_glue() -> None:
    pattern = discover_pattern(Listed(), "listed", SHAPE)
    assert pattern.units == (("convs.0", "@relu"), ("convs.1",))
    assert pattern.head == ("@relu", "@flatten", "classifier")


def test_the_order_is_that_of_the_calls_not_of_the_attributes() -> None:
    pattern = discover_pattern(OtherOrder(), "other order", SHAPE)
    assert pattern.units == (("first", "relu"), ("second",))
    assert pattern.head == ("relu", "pool", "@flatten", "head")


def test_tokens_are_features_too() -> None:
    pattern = discover_pattern(Tokens(), "tokens", SHAPE)
    assert pattern.units == (("embed.0", "embed.1", "embed.2"), ("mix.0", "mix.1"), ("mix.2",))
    assert pattern.head == ("head.0", "head.1")


def test_a_convolution_can_be_the_classifier() -> None:
    pattern = discover_pattern(convolutional_classifier(), "squeezed", SHAPE)
    assert pattern.units == (("0", "1"),)
    assert pattern.head == ("2", "3", "4")


def test_the_rule_finds_the_units_of_a_known_architecture() -> None:
    spec = ModelSpec("resnet18", ("a", "b"), (3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    model = zoo.build(spec)
    assert discover_pattern(model, "resnet18", (3, 32, 32)) == pattern_for(model)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (LongSkip, "cannot be split at classifier: it takes 2×384, and convs.1 gives 2×6×8×8"),
        (Twice, "same has parameters and is called 2 times"),
        (Unused, "spare has parameters and is called never"),
        (Scaled, "cannot be split after classifier: its output is not the model's"),
        (Attention, "attention is called with more than one tensor"),
        (flat, "none of its children gives a feature map"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), r"must return logits of shape \(batch, classes\)"),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), "cannot take images.*input_shape"),
    ],
)
def test_what_stands_in_the_way_is_named(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        discover_pattern(build(), "mine", SHAPE)


def test_looking_leaves_no_trace_on_the_model() -> None:
    model = plain()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    discover_pattern(model, "plain", SHAPE)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
