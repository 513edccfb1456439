"""What the proof has to see though outputs, and gradients of ordinary size, do not show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedepth.errors import ModelError
from fedepth.models.export import export_model
from fedepth.models.verify import verify

Gradient = Callable[[torch.Tensor], torch.Tensor]


class Custom(nn.Module):
    """A backward pass of its own between two layers."""

    def __init__(self, backward: Gradient) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 10)

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x * 1.0

            @staticmethod
            def backward(ctx: Any, *gradient: torch.Tensor) -> torch.Tensor:
                return backward(gradient[0])

        self.between = Function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between.apply(self.first(x)))  # type: ignore[no-any-return]


class HalfPrecision(nn.Module):
    """Gradients pass through float16, in which large ones become infinite: so they do in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).half().float())  # type: ignore[no-any-return]


def proved(module: nn.Module) -> float:
    return verify(module, export_model(module, "custom", (6,), "F32", 10), "custom")


@pytest.mark.parametrize(
    ("backward", "scale"),
    [
        (lambda gradient: gradient.clamp(-1e6, 1e6), "1e+09"),
        (lambda gradient: gradient * (1e6 / gradient.norm().clamp_min(1e6)), "1e+09"),
        (lambda gradient: torch.where(gradient.abs() < 1e-6, 0.0, gradient), "9e-10"),
        (lambda gradient: gradient + 1e-7, "9e-10"),
    ],
    ids=["clipped by value", "clipped by norm", "small ones dropped", "a small bias"],
)
def test_a_backward_pass_that_changes_only_large_or_small_gradients_is_refused(backward: Gradient, scale: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=r"the gradient of first\.\w+ \(training mode.*custom backward") as caught:
        proved(Custom(backward))
    assert f"gradients of scale {scale}" in str(caught.value)


def test_a_backward_pass_that_is_autograds_own_is_kept() -> None:
    torch.manual_seed(0)
    assert proved(Custom(lambda gradient: gradient * 1.0)) == 0.0


def test_gradients_that_the_graph_rounds_as_the_module_does_are_no_difference() -> None:
    torch.manual_seed(0)
    assert proved(HalfPrecision()) == 0.0


class Branching(Custom):
    """Centres a batch, but for one of 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        return self.second(x - x.mean(0) if x.shape[0] > 1 else x)  # type: ignore[no-any-return]


class Checkpointed(Custom):
    """Runs its BatchNorm once more in the backward pass, which counts that batch twice."""

    def __init__(self, backward: Gradient) -> None:
        super().__init__(backward)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.second(checkpoint(self.norm, x, use_reentrant=False))  # type: ignore[no-any-return]


class OneDropout(Custom):
    """One dropout for the logits and for another output."""

    def __init__(self, backward: Gradient) -> None:
        super().__init__(backward)
        self.dropout = nn.Dropout(0.4)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.first(x)
        other = self.dropout(x)
        return self.second(self.dropout(x.tanh())), other


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Branching, r"training mode, batch 1,.*it does not treat a batch of 1 as it treats others"),
        (Checkpointed, r"in norm\.\w+ .*torch\.utils\.checkpoint does with a BatchNorm"),
        (OneDropout, r"uses dropout both for the logits and, at .*, in forward: other = self\.dropout\(x\)"),
    ],
)
def test_a_difference_has_its_reason(kind: type[Custom], words: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=words):
        proved(kind(lambda gradient: gradient))


@pytest.mark.parametrize("kind", ["frozen parameter", "buffer"])
def test_a_trained_parameter_that_shares_memory_is_refused(kind: str) -> None:
    module = nn.Sequential(nn.Linear(6, 10))
    if kind == "buffer":
        module.register_buffer("copy", module[0].weight.data)
    else:
        module.register_parameter("copy", nn.Parameter(module[0].weight.data, requires_grad=False))
    with pytest.raises(ModelError, match=r"copy and 0\.weight .*share memory|0\.weight and copy .*share memory"):
        proved(module)


class Reading(Custom):
    """A plain classifier of 6 numbers, whose logits `read` looks at last."""

    def __init__(self, read: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__(lambda gradient: gradient)
        self.norm = nn.BatchNorm1d(8, track_running_stats=False)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self, self.first(x))


def batch_statistics(net: Any, x: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = net.second(net.norm(x.unsqueeze(2).repeat(1, 1, 3))[:, :, 0])
    return logits


def attention_over_the_batch(net: Any, x: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = net.second(net.attention(x.unsqueeze(1)).mean(1))
    return logits


def softmax(net: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(net.second(x), 1)


def softmax_in_evaluation(net: Any, x: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = net.second(x)
    return logits if net.training else logits.softmax(1)


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (batch_statistics, "for a sample depends on the other samples .* a BatchNorm with track_running_stats=False"),
        (attention_over_the_batch, "for a sample depends on the other samples .* without batch_first=True"),
        (softmax, r"returns probabilities \(training mode"),
        (softmax_in_evaluation, r"returns probabilities \(evaluation mode"),
    ],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_what_says_something_else_than_the_logits_of_a_sample_is_refused(
    read: Callable[[nn.Module, torch.Tensor], torch.Tensor], words: str
) -> None:
    """Everything would come out well: losses fall, the exported file equals the model, on the same batches."""
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=words):
        proved(Reading(read))


def test_dropout_in_evaluation_is_no_dependence_on_other_samples() -> None:
    torch.manual_seed(0)
    assert proved(Reading(lambda net, x: net.second(nn.functional.dropout(x)))) < 1e-6  # type: ignore[operator]


def own_statistics(net: Any, x: torch.Tensor) -> torch.Tensor:
    if net.training:
        x = (x - x.mean(0)) / x.var(0).sqrt()
    logits: torch.Tensor = net.second(x)
    return logits


def test_a_model_that_takes_the_variance_of_its_batch_by_itself_is_refused() -> None:
    """A device with little memory would train on one sample at once, and blame the learning rate."""
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=r"finite in training for a batch of two and not for one, .*correction=0"):
        export_model(Reading(own_statistics), "custom", (6,), "F32", 10)


def test_inputs_that_are_never_negative_are_no_reason_to_refuse_a_model() -> None:
    """It is tried with random numbers, of which some are."""
    torch.manual_seed(0)
    assert proved(Reading(lambda net, x: net.second(x.log1p()))) < 1e-6  # type: ignore[operator]


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_other_precision_than_devices_have_is_refused(kind: torch.dtype) -> None:
    module = Reading(lambda net, x: net.second(x.to(kind)).float())  # type: ignore[operator]
    module.second.to(kind)
    with pytest.raises(ModelError, match=r"has a parameter second\.weight in .*; call \.float\(\) on it"):
        export_model(module, "custom", (6,), "F32", 10)
