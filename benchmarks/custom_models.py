"""Models as people write them: small modules with everything that a graph has to keep, and some that it cannot hold.

Every function takes no argument, or the job's ModelSpec. `KEPT` names those that must be accepted, `REFUSED` those that
must not, with a word of the reason.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

CLASSES = 10


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def batch_norm_cnn() -> nn.Module:
    return nn.Sequential(
        *_conv(3, 8, nn.BatchNorm2d(8)),
        *_conv(8, 16, nn.BatchNorm2d(16)),
        nn.MaxPool2d(2),
        *_conv(16, 16, nn.BatchNorm2d(16)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def group_norm_cnn() -> nn.Module:
    return nn.Sequential(
        *_conv(3, 16, nn.GroupNorm(4, 16)),
        nn.MaxPool2d(2),
        *_conv(16, 32, nn.GroupNorm(4, 32)),
        *_conv(32, 32, nn.GroupNorm(4, 32)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


def _conv(inputs: int, outputs: int, norm: nn.Module) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm, nn.ReLU(inplace=True)


def series_cnn() -> nn.Module:
    """A 1-D convolutional net on series (2, 64)."""
    return nn.Sequential(
        nn.Conv1d(2, 16, 5, padding=2),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


class LstmClassifier(nn.Module):
    """Series (time, inputs) to the last hidden state."""

    def __init__(self, inputs: int = 8, width: int = 16) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, width, num_layers=2, batch_first=True)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.lstm(x)
        return self.classifier(hidden[:, -1])  # type: ignore[no-any-return]


class GruClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 16, batch_first=True)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, last = self.gru(x)
        return self.classifier(last[0])  # type: ignore[no-any-return]


class TextEncoder(nn.Module):
    """nn.TransformerEncoder on token ids."""

    def __init__(self, length: int = 16, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2 * width, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids) + self.position
        return self.classifier(self.encoder(x).mean(1))  # type: ignore[no-any-return]


class Gpt(nn.Module):
    """A small causal transformer; its mask and positions follow from sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(64, 32)
        self.positions = nn.Embedding(16, 32)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for _ in range(3))
        self.classifier = nn.Linear(32, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        x = self.tokens(ids) + self.positions(torch.arange(length, device=ids.device))
        mask = torch.triu(torch.full((length, length), float("-inf"), device=ids.device), 1)
        for block in self.blocks:
            x = block(x, src_mask=mask)
        return self.classifier(x[:, -1])  # type: ignore[no-any-return]


class PaddedText(nn.Module):
    """A padding mask that comes from the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.mix = nn.Linear(32, 32)
        self.classifier = nn.Linear(32, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mask = (ids != 0).unsqueeze(-1).to(torch.float32)
        x = torch.tanh(self.mix(self.embedding(ids))) * mask
        return self.classifier(x.sum(1) / mask.sum(1).clamp_min(1.0))  # type: ignore[no-any-return]


class Small(nn.Module):
    """Two convolutions and a classifier; what the others vary."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.classifier = nn.Linear(8, CLASSES)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.between(self.first(x))
        x = F.relu(self.second(x))
        return self.classifier(x.mean((2, 3)))  # type: ignore[no-any-return]


class FunctionalDropout(Small):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(F.relu6(x), 0.3, training=self.training)


class AlwaysDropout(Small):
    """Dropout that runs in evaluation too, as for Monte Carlo estimates."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.3, training=True)


class Clamped(Small):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-0.5, 0.5)


class ModeBranch(Small):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if self.training else x + 1


class InPlaceSlices(Small):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 1.0
        y[:, :4] = y[:, :4].relu()
        y[:, 4:] += 1
        return y


class StochasticDepth(Small):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.8).div_(0.8)
        return x * keep


class InPlaceActivations(Small):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.first(x))
        x = F.hardswish(self.second(x), inplace=True)
        return self.classifier(x.mean((2, 3)))  # type: ignore[no-any-return]


def spectral() -> nn.Module:
    model = Small()
    parametrizations.spectral_norm(model.first)
    parametrizations.spectral_norm(model.second)
    return model


def spectral_hooks() -> nn.Module:
    model = Small()
    model.second = nn.utils.spectral_norm(model.second)
    return model


def weight_normed() -> nn.Module:
    model = Small()
    model.second = parametrizations.weight_norm(model.second)
    return model


def weight_norm_hooks() -> nn.Module:
    model = Small()
    model.second = weight_norm(model.second)
    return model


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(20, 20)
        self.middle = nn.Linear(20, 20)
        self.two = nn.Linear(20, 20)
        self.two.weight = self.one.weight
        self.last = nn.Linear(20, 16)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.middle(self.one(x).relu()).relu()).relu()
        return self.classifier(self.last(x).relu())  # type: ignore[no-any-return]


class Repeated(nn.Module):
    """The same block three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU())
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + self.block(x)
        return self.classifier(x.mean((2, 3)))  # type: ignore[no-any-return]


def frozen_backbone() -> nn.Module:
    model = batch_norm_cnn()
    for parameter in list(model.parameters())[:-5]:
        parameter.requires_grad_(False)
    return model


class PlainTensor(Small):
    """A tensor that is neither parameter nor buffer, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.linspace(0.5, 1.5, 8).view(1, 8, 1, 1)
        self.register_buffer("shift", torch.linspace(-1, 1, 8).view(1, 8, 1, 1), persistent=False)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.shift  # type: ignore[operator]


class Counter(Small):
    """A buffer that counts calls, and changes nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls.add_(1)  # type: ignore[operator]
        return F.relu(x)


class UNet(nn.Module):
    """A skip over several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.join = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 16, 3, padding=1)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        y = self.up(F.relu(self.down(x)))
        x = F.relu(self.join(torch.cat((x, y), 1)))
        x = F.relu(self.last(x))
        return self.classifier(x.mean((2, 3)))  # type: ignore[no-any-return]


class SeveralOutputs(Small):
    def forward(self, x: torch.Tensor) -> Any:
        x = F.relu(self.first(x))
        early = x.mean((2, 3))
        x = F.relu(self.second(x))
        return self.classifier(x.mean((2, 3))), early


class DictOutput(Small):
    def forward(self, x: torch.Tensor) -> Any:
        return {"logits": super().forward(x)}


class Viewing(nn.Module):
    """x.view(x.size(0), -1) in a child, behind convolutions that run in channels_last."""

    class Flat(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(x.size(0), -1)

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
        self.flat = self.Flat()
        self.classifier = nn.Linear(4 * 16 * 16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.flat(self.features(x)))  # type: ignore[no-any-return]


class SqueezeExcite(Small):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(8, 2, 1)
        self.excite = nn.Conv2d(2, 8, 1)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return x * gate


class AttentionPooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.query = nn.Parameter(torch.randn(1, 1, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        pooled, _ = self.attention(self.query.expand(x.shape[0], -1, -1), tokens, tokens, need_weights=False)
        return self.classifier(pooled[:, 0])  # type: ignore[no-any-return]


def pre_hooked() -> nn.Module:
    model = Small()
    model.second.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    return model


def replaced_forward() -> nn.Module:
    model = Small()
    model.second.forward = lambda input: F.conv2d(input, model.second.weight) + 1  # type: ignore[method-assign]
    return model


def adapters() -> nn.Module:
    """A frozen model with small trainable layers put in."""
    model = batch_norm_cnn()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = list(model)  # type: ignore[call-overload]
    adapter = nn.Conv2d(16, 16, 1)
    return nn.Sequential(*layers[:7], adapter, *layers[7:-1], nn.Linear(16, CLASSES))


# --- what a graph cannot hold


class ItemControl(Small):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        if x.mean().item() > 0:
            return x * 2
        return x


class Numpy(Small):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(np.abs(x.detach().numpy()).mean())


class NumpyRandom(Small):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(np.random.rand() + 0.5)


class PythonRandom(Small):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x * (random.random() + 0.5)


class PythonCounter(Small):
    calls = 0

    def between(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> torch.Tensor:
        return gradient[0] * 2


class CustomBackward(Small):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return _Doubled.apply(x)  # type: ignore[no-any-return]


def backward_hook() -> nn.Module:
    model = Small()
    model.second.register_full_backward_hook(lambda _, inputs, outputs: (inputs[0] * 2,))  # type: ignore[index]
    return model


def gradient_hook() -> nn.Module:
    model = Small()
    model.second.weight.register_hook(lambda gradient: gradient * 2)  # type: ignore[no-untyped-call]
    return model


class Autocast(Small):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.conv2d(x, self.second.weight, padding=1).float()


class AuxiliaryDropout(Small):
    """An auxiliary output, for training only, whose dropout draws random numbers before the logits' own."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, CLASSES))
        self.dropout = nn.Dropout(0.3)

    def extra(self, x: torch.Tensor) -> torch.Tensor:
        return self.auxiliary(x.mean((2, 3)))  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> Any:
        x = F.relu(self.first(x))
        extra = self.extra(x) if self.training else None
        x = F.relu(self.second(x))
        logits = self.classifier(self.dropout(x.mean((2, 3))))
        return logits if extra is None else (logits, extra)


class AuxiliaryFunctionalDropout(AuxiliaryDropout):
    def extra(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(F.dropout(x.mean((2, 3)), 0.5))  # type: ignore[no-any-return]


class DataAssignment(Small):
    """Holds the norm of its weights down, as models of brain signals do."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        self.second.weight.data = torch.renorm(self.second.weight.data, 2, 0, 1.0)
        return F.relu(x)


class NormHeldDown(Small):
    """The same in a way that a graph can hold."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.second.weight.copy_(torch.renorm(self.second.weight, 2, 0, 0.5))
        return F.relu(x)


class CountingObject(Small):
    """Counts in a dictionary, and behaves otherwise much later."""

    def __init__(self) -> None:
        super().__init__()
        self.state = {"steps": 0}

    def between(self, x: torch.Tensor) -> torch.Tensor:
        self.state["steps"] += 1
        return F.relu(x) if self.state["steps"] < 100 else torch.tanh(x)


class CountingClass(Small):
    calls = np.int64(0)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        CountingClass.calls += 1
        return F.relu(x) if CountingClass.calls < 100 else torch.tanh(x)


class CountingHook(Small):
    def __init__(self) -> None:
        super().__init__()
        calls = [0]

        def count(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            calls[0] += 1
            return None if calls[0] < 100 else torch.tanh(output)

        self.first.register_forward_hook(count)


class OwnGenerator(Small):
    """Skips an activation seldom, by numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(5)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.training and self.generator.random() < 0.01 else F.relu(x)


class PlainCounter(Small):
    """Steps in a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.step = torch.zeros(())

    def between(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.step += 1
        return F.relu(x) / (1 + 0.1 * self.step)


class TwinStatistics(Small):
    """Two tensors that are equal at first. Training writes one; evaluation reads the other."""

    def __init__(self) -> None:
        super().__init__()
        self.means = [torch.zeros(8), torch.zeros(8)]

    def between(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.means[0 if self.training else 1]
        if self.training:
            mean.mul_(0.5).add_(x.detach().mean((0, 2, 3)), alpha=0.5)
        return F.relu(x - mean.view(-1, 1, 1))


class BlurredStem(Small):
    """A convolution with a fixed filter, and masks that are joined."""

    blur: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("blur", torch.ones(8, 1, 3, 3) / 9)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        mask = (x > -2) & (x < 2) | (x > 3)
        return F.conv2d(torch.where(mask, x, 0.5 * x), self.blur, padding=1, groups=8)


def cumulative_norm() -> nn.Module:
    norm = nn.BatchNorm2d(8, momentum=None)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))


class StaticBatch(Small):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(int(x.shape[0]), -1).view(3, 8, 16, 16)


class LengthAsBatch(Small):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.zeros(len(x), 1, 1, 1)


class NoLogits(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.first(x))


class BooleanMask(Small):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x + x[x > 0].sum()


def wide_group_norm_cnn() -> nn.Module:
    widths = (3, 32, 64, 64, 128, 128)
    layers = [
        layer
        for inputs, outputs in pairwise(widths)
        for layer in (*_conv(inputs, outputs, nn.GroupNorm(8, outputs)), *([nn.MaxPool2d(2)] if inputs != 64 else []))
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSES))


def wide_series_cnn() -> nn.Module:
    widths = (4, 64, 64, 128, 128)
    layers = [
        layer
        for inputs, outputs in pairwise(widths)
        for layer in (nn.Conv1d(inputs, outputs, 7, padding=3), nn.BatchNorm1d(outputs), nn.ReLU(), nn.MaxPool1d(2))
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(128, CLASSES))


def wide_lstm() -> nn.Module:
    return LstmClassifier(32, 192)


def wide_text_encoder() -> nn.Module:
    return TextEncoder(length=64, width=192, layers=4)


class SliceStatistics(Small):
    """A buffer that is written through a slice of it."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2, 8))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean[0].mul_(0.5).add_(x.detach().mean((0, 2, 3)), alpha=0.5)
        return F.relu(x - self.mean[0].view(-1, 1, 1))


class AssignedStatistics(Small):
    """A buffer that is assigned anew."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        return F.relu(x - self.mean.view(-1, 1, 1))


class LinearProbe(Small):
    """A backbone that runs without gradients, whatever its parameters say."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = F.relu(self.second(F.relu(self.first(x))))
        return self.classifier(x.mean((2, 3)))  # type: ignore[no-any-return]


class SmallVocabulary(nn.Module):
    """Four letters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 16)
        self.mix = nn.Linear(16, 16)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.tanh(self.mix(self.embedding(ids))).mean(1))  # type: ignore[no-any-return]


class ModeConstants(Small):
    """Constants of its own in each mode."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            x = x + torch.tensor([0.1]) * torch.randn_like(x)
        return F.relu(x - torch.linspace(0.0, 0.1, 8).view(1, 8, 1, 1) * torch.tensor([[[[2.0]]]]))


class DoubleBuffer(Small):
    """float32 plus float64 in place stays float32; out of place it would not."""

    offset: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.from_numpy(np.linspace(0.0, 1.0, 8)).view(1, 8, 1, 1))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        x += self.offset
        return F.relu(x)


class SpreadMask(Small):
    """A buffer that is one value in many places."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.linspace(0.5, 1.5, 8).view(1, 8, 1, 1).expand(1, 8, 16, 16))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x * self.mask)


class NoAutocast(Small):
    """Says that it does not want autocast."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.relu(x * 2)


class AuxiliaryFirst(Small):
    """Trained for one output, used for another."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> Any:
        x = F.relu(self.first(x))
        auxiliary = self.auxiliary(x.mean((2, 3)))
        logits = self.classifier(F.relu(self.second(x)).mean((2, 3)))
        return (auxiliary, logits) if self.training else logits


class MergedAdapter(Small):
    """An adapter that is merged into the weights for evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(CLASSES, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Any:
        if mode == self.merged:
            sign = -1 if mode else 1
            self.classifier.weight.data += sign * (self.up @ self.down).data
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.second(F.relu(self.first(x)))).mean((2, 3))
        found: torch.Tensor = self.classifier(x)
        return found if self.merged else found + x @ self.down.T @ self.up.T


class LayerDrop(Small):
    """Leaves a layer out, but seldom."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.training and random.random() < 0.01 else F.relu(x)


class SeldomNumpy(Small):
    """The same with numpy's random numbers."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.training and np.random.rand() < 0.01 else F.relu(x)


def clipped() -> nn.Module:
    """A hook that changes large gradients only."""
    module = Small()
    module.first.weight.register_hook(lambda gradient: gradient.clamp(-5, 5))  # type: ignore[no-untyped-call]
    return module


class ClippedInside(Small):
    """The same of an activation."""

    most = 0.1

    def between(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient.clamp(-self.most, self.most))  # type: ignore[no-untyped-call]
        return F.relu(x)


class ClippedFarOff(ClippedInside):
    """At a value that no trial reaches."""

    most = 1e6


class FlatAlias(Small):
    """Writes to a view of its maps, which is a copy in another memory format."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        flat[:, :500] *= 3
        return x.tanh()


class Squeezed(Small):
    """Without a batch where that is 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).squeeze())  # type: ignore[no-any-return]


class GradientMode(Small):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x) if torch.is_grad_enabled() else F.relu(x) * 3


class Annealed(Small):
    """A number that changes a little with every run."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0

    def between(self, x: torch.Tensor) -> torch.Tensor:
        self.temperature *= 0.999999
        return torch.tanh(x / self.temperature)


def sparse_embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(8, 16, sparse=True), nn.Flatten(), nn.Linear(256, CLASSES))


def lazy() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES))


def all_frozen() -> nn.Module:
    return Small().requires_grad_(False)


class ConstantMask(Small):
    """A mask whose size torch does not know when it traces."""

    keep: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keep", torch.arange(8) < 8)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x[:, self.keep])


class UnknownOperator(Small):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)  # type: ignore[no-any-return]


_IMAGE, _IDS, _VECTOR = ((3, 16, 16), "float"), ((16,), "tokens"), ((20,), "float")

# Name of the function, the input's shape, and its type.
KEPT: dict[str, tuple[tuple[int, ...], str]] = {
    "mlp": _VECTOR,
    "batch_norm_cnn": _IMAGE,
    "group_norm_cnn": _IMAGE,
    "series_cnn": ((2, 64), "float"),
    "LstmClassifier": ((12, 8), "float"),
    "GruClassifier": ((12, 8), "float"),
    "TextEncoder": _IDS,
    "Gpt": _IDS,
    "PaddedText": _IDS,
    "FunctionalDropout": _IMAGE,
    "AlwaysDropout": _IMAGE,
    "Clamped": _IMAGE,
    "ModeBranch": _IMAGE,
    "InPlaceSlices": _IMAGE,
    "StochasticDepth": _IMAGE,
    "InPlaceActivations": _IMAGE,
    "spectral": _IMAGE,
    "spectral_hooks": _IMAGE,
    "weight_normed": _IMAGE,
    "weight_norm_hooks": _IMAGE,
    "Tied": _VECTOR,
    "Repeated": _IMAGE,
    "frozen_backbone": _IMAGE,
    "PlainTensor": _IMAGE,
    "Counter": _IMAGE,
    "UNet": _IMAGE,
    "SeveralOutputs": _IMAGE,
    "DictOutput": _IMAGE,
    "Viewing": _IMAGE,
    "SqueezeExcite": _IMAGE,
    "AttentionPooling": _IMAGE,
    "pre_hooked": _IMAGE,
    "replaced_forward": _IMAGE,
    "adapters": _IMAGE,
    "SliceStatistics": _IMAGE,
    "AssignedStatistics": _IMAGE,
    "LinearProbe": _IMAGE,
    "SmallVocabulary": _IDS,
    "ModeConstants": _IMAGE,
    "DoubleBuffer": _IMAGE,
    "SpreadMask": _IMAGE,
    "NoAutocast": _IMAGE,
    "NormHeldDown": _IMAGE,
    "PlainCounter": _IMAGE,
    "TwinStatistics": _IMAGE,
    "BlurredStem": _IMAGE,
}

# The same of those in which memory is worth a look.
WIDE: dict[str, tuple[tuple[int, ...], str]] = {
    "wide_group_norm_cnn": ((3, 32, 32), "float"),
    "wide_series_cnn": ((4, 512), "float"),
    "wide_lstm": ((48, 32), "float"),
    "wide_text_encoder": ((64,), "tokens"),
}

# Name of the function, and words that its refusal has to hold.
REFUSED: dict[str, str] = {
    "ItemControl": "custom_models.py",
    "Numpy": "custom_models.py",
    "NumpyRandom": "deterministic",
    "PythonRandom": "deterministic",
    "PythonCounter": "",
    "CustomBackward": "gradient",
    "backward_hook": "gradient",
    "gradient_hook": "gradient",
    "Autocast": "autocast",
    "StaticBatch": "custom_models.py",
    "LengthAsBatch": "custom_models.py",
    "NoLogits": "logits",
    "BooleanMask": "custom_models.py",
    "AuxiliaryFirst": "classifier.bias",
    "MergedAdapter": "changes classifier.weight when it is put into",
    "LayerDrop": "random numbers from Python",
    "SeldomNumpy": "random numbers from Python or numpy",
    "clipped": "hook on the gradient of first.weight",
    "ClippedInside": "gradient",
    "FlatAlias": "channels_last",
    "Squeezed": "squeeze()",
    "GradientMode": "torch.no_grad()",
    "Annealed": "changes temperature whenever it runs",
    "sparse_embedding": "sparse=True",
    "lazy": "not initialised",
    "all_frozen": "nothing to train",
    "UnknownOperator": "custom_models.py",
    "ConstantMask": "a mask as index at",
    "AuxiliaryFunctionalDropout": "for an output that is left out",
    "DataAssignment": "copy_(...) under torch.no_grad()",
    "cumulative_norm": "momentum=None in 1",
    "CountingObject": "changes state['steps'] whenever it runs",
    "CountingClass": "changes CountingClass.calls whenever it runs",
    "CountingHook": "whenever it runs",
    "OwnGenerator": "changes generator whenever it runs",
    "ClippedFarOff": "hooks into the gradient of an activation at",
}
