"""Two networks for the features of a table; both keep one width, so that a block may end behind any layer.

LayerNorm keeps samples apart: micro-batches give the gradients of the whole batch.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 128
LAYERS = 4
DROPOUT = 0.1


class TableMLP(nn.Module):
    """Linear layers of one width, each with a norm and ReLU; (B, features) to logits."""

    def __init__(self, features: int, classes: int, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(each, width), nn.LayerNorm(width), nn.ReLU(), nn.Dropout(DROPOUT))
            for each in (features, *(width,) * (layers - 1))
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(x)
        return logits


class TableResNet(nn.Module):
    """A linear stem and residual blocks (arXiv 2106.11959, section 3.2, with LayerNorm); (B, features) to logits."""

    def __init__(self, features: int, classes: int, width: int = WIDTH, blocks: int = LAYERS) -> None:
        super().__init__()
        self.stem = nn.Linear(features, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


class ResidualBlock(nn.Module):
    """x + dropout(linear(dropout(ReLU(linear(norm(x)))))), twice as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.dropout(F.relu(self.wide(self.norm(x))))
        out: torch.Tensor = x + self.dropout(self.narrow(inner))
        return out
