"""Which dimension of a series holds its channels: what its operators say, and what the exits of a net make of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedepth.models.auxiliary import with_auxiliary
from fedepth.models.export import Exported, export_model
from fedepth.models.run import Model
from fedepth.models.skip import skip


def exported(module: nn.Module, shape: tuple[int, ...]) -> Exported:
    torch.manual_seed(0)
    return export_model(module, "series", shape, "F32", 5)


def convolutions() -> nn.Module:
    """With a large classifier, so that what stands before it is the head's, which takes a vector."""
    return nn.Sequential(
        *(nn.Conv1d(1, 16, 5, padding=2), nn.BatchNorm1d(16), nn.ReLU()),
        *(nn.Conv1d(16, 32, 5, 2, 2), nn.MaxPool1d(2), nn.Dropout(0.1)),
        *(nn.Conv1d(32, 32, 3, padding="same"), nn.GELU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU()),
        nn.Linear(64, 5),
    )


def tokens() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(4, 16), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(128, 64), Last())


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layer(x.relu())
        return logits


class Turned(nn.Module):
    """A residual layer over channels that come first, through one for which they come last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv1d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8 * 12, 5)
        self.wide = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        logits: torch.Tensor = self.wide(self.head(x.flatten(1)).relu())
        return logits


class Sensors(nn.Module):
    """Moments of sensors (T, C), turned for a convolution, as readings of a table come."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)
        self.head, self.last = nn.Linear(96, 64), nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x.transpose(1, 2)).relu()).relu()
        logits: torch.Tensor = self.last(self.head(x.flatten(1)).relu())
        return logits


class Mixer(nn.Module):
    """Tokens (T, D), mixed over T and over D in turn (arXiv 2105.01601)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.tokens, self.features = nn.Linear(12, 12), nn.Linear(6, 6)
        self.head, self.last = nn.Linear(72, 64), nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.features(self.norm(x))
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        logits: torch.Tensor = self.last(self.head(x.flatten(1)).relu())
        return logits


def normed() -> nn.Module:
    """With a norm over channels and time together."""
    return nn.Sequential(
        *(nn.Conv1d(1, 8, 3, padding=1), nn.LayerNorm([8, 32]), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=1)),
        *(nn.LayerNorm([8, 32]), nn.ReLU(), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 5)),
    )


@pytest.mark.parametrize(
    ("make", "shape", "channels"),
    [
        (convolutions, (1, 64), 0),
        (normed, (1, 32), 0),
        (tokens, (8, 4), 1),
        (Turned, (3, 12), 0),
        (Sensors, (12, 3), 0),
        (Mixer, (12, 4), 1),
    ],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_operators_of_a_unit_tell(make: Callable[[], nn.Module], shape: tuple[int, ...], channels: int) -> None:
    model = Model(exported(make(), shape).graph)
    series = [unit for unit, out in zip(model.units, model.graph.output_shapes, strict=True) if len(out) == 2]
    assert len(series) >= 1
    assert {unit.channels for unit in series} == {channels}


def test_the_mean_behind_a_convolution_is_over_time() -> None:
    x = torch.tensor([[[1.0, 3.0, 5.0, 7.0], [0.0, 0.0, 2.0, 2.0]]])  # two channels, four moments
    assert torch.equal(skip(x, (3,), 0), torch.tensor([[4.0, 1.0, 0.0]]))
    assert torch.equal(skip(x, (4,)), torch.tensor([[0.5, 1.5, 3.5, 4.5]]))  # as of tokens, where nothing tells
    assert torch.equal(skip(x, (2, 2), 0), torch.tensor([[[2.0, 6.0], [0.0, 2.0]]]))


def test_auxiliary_heads_of_a_convolutional_net_are_over_its_channels() -> None:
    found = with_auxiliary(exported(convolutions(), (1, 64)), 5, seed=1).graph
    widths = [found.tensors[f"auxiliary.{number}.linear.weight"][1][1] for number in range(3)]
    assert widths == [16, 32, 32]
    assert found.output_shapes[:3] == ((16, 64), (32, 16), (32, 16))
