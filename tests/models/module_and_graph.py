"""A module's step beside its graph's, written without the code that proves them equal."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fedepth.models.export import Exported
from fedepth.models.graph import decode, encode
from fedepth.models.run import Model


def difference_of_steps(module: nn.Module, exported: Exported, batch: int, *, training: bool) -> float:
    """The largest difference of logits, gradients and buffers, relative to what is compared; 0.0 if all are equal.

    The module's weights are moved first, so that norms and biases do something, and stay so.
    """
    graph = decode(encode(exported.graph))
    generator = torch.Generator().manual_seed(batch)
    with torch.no_grad():
        for each in module.parameters():
            each.add_(0.1 * torch.randn(each.shape, generator=generator))
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    fresh = {each: own.get(each, tensor).detach().clone() for each, tensor in exported.tensors.items()}
    model = Model(graph)
    model.load(fresh.__getitem__, trainable=True)
    model.train(training)
    module.train(training)
    module.zero_grad()
    shape = (batch, *graph.input_shape)
    tokens = graph.input_type == "I64"
    largest = exported.largest_id + 1
    x = torch.randint(0, largest, shape, generator=generator) if tokens else torch.randn(shape, generator=generator)
    torch.manual_seed(3)
    expected = next(leaf for leaf in tree_leaves(module(x.clone())) if isinstance(leaf, torch.Tensor))
    torch.autograd.backward(expected.square().sum())
    torch.manual_seed(3)
    found = model(x.clone())
    torch.autograd.backward(found.square().sum())
    pairs = [(found, expected)]
    for name, parameter in module.named_parameters():
        mine = fresh[name].grad if name in fresh else None
        if parameter.grad is not None and (mine is not None or float(parameter.grad.abs().max()) > 0):
            assert mine is not None, name
            pairs.append((mine, parameter.grad))
    pairs += [(fresh[name], buffer) for name, buffer in module.named_buffers() if name in fresh]
    return max(_relative(mine.detach().double(), theirs.detach().double()) for mine, theirs in pairs)


def _relative(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    assert mine.shape == theirs.shape
    if torch.equal(mine, theirs):
        return 0.0
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
