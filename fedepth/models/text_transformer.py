"""A small transformer encoder for texts.

A mask of padding depends on the input, and a model can only be cut where one tensor does. So the mask travels with the
activations: channel 0 of every position is 1 where a token stands and 0 where there is padding, and no layer adds to
it. A cache rounds by much less than the half that tells the two apart.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fedepth.data.text import PADDING

WIDTH = 128
LAYERS = 4
HEADS = 4
DROPOUT = 0.1
# Added to the attention on padding. Not infinite: of a text without a token, softmax would make NaN.
_MASKED = -1e4


class TextTransformer(nn.Module):
    """Token ids (B, length) to logits: an embedding, layers with the norm in front (arXiv 2002.04745), a mean."""

    def __init__(
        self, vocabulary: int, length: int, classes: int, width: int = WIDTH, layers: int = LAYERS, heads: int = HEADS
    ) -> None:
        """`vocabulary`: ids are below it; 0 is padding."""
        super().__init__()
        self.embedding = Embedding(vocabulary, length, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.head = Head(width, classes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, length) int64 ids to (B, classes) logits."""
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(x)
        return logits


class Embedding(nn.Module):
    """Of tokens and of their positions, behind the mask."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width - 1)
        self.positions = nn.Parameter(torch.empty(length, width - 1))
        nn.init.normal_(self.tokens.weight, std=0.1)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, length) to (B, length, width)."""
        is_token = (ids != PADDING).to(torch.float32).unsqueeze(2)
        return torch.cat((is_token, (self.tokens(ids) + self.positions) * is_token), 2)


class Layer(nn.Module):
    """Attention and two linear layers, each added to what comes in, but for channel 0."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width - 1)
        self.norm2 = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width - 1)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to (B, T, D)."""
        is_token = (x[:, :, :1] > 0.5).to(x.dtype)  # (B, T, 1)
        x = x + self._behind_mask(self.attention_out(self._attend(self.norm1(x), is_token)), is_token)
        return x + self._behind_mask(self.narrow(F.gelu(self.wide(self.norm2(x)))), is_token)

    def _attend(self, x: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = self.attention_in(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, T, D / heads)
        masked = ((1 - is_token) * _MASKED).view(batch, 1, 1, length).expand(batch, 1, length, length)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=masked)
        return found.transpose(1, 2).reshape(batch, length, width)

    def _behind_mask(self, x: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        return F.pad(self.dropout(x) * is_token, (1, 0))


class Head(nn.Module):
    """Norm, mean over the tokens, classifier."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to (B, classes)."""
        is_token = (x[:, :, :1] > 0.5).to(x.dtype)
        mean = (self.norm(x) * is_token).sum(1) / is_token.sum(1).clamp_min(1)
        logits: torch.Tensor = self.classifier(mean)
        return logits
