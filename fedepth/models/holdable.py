"""What a graph cannot hold and no output shows, looked for in the module itself before it is exported."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from fedepth.errors import ModelError


def check_module(module: nn.Module, name: str) -> None:
    """Raises ModelError, with what to change, for hooks on gradients, weights that are not there yet or lie in a way
    that no optimizer step suits, wrappers, and modes that change weights."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(module, "_orig_mod"):
        raise ModelError(f"the model {name} is wrapped in a {type(module).__name__}; return the module inside it")
    for path, each in module.named_modules():
        # One that was traced runs as a part of another module, though not alone.
        if isinstance(each, torch.jit.ScriptModule) and not (path and isinstance(each, torch.jit._trace.TracedModule)):
            raise ModelError(
                f"the model {name} has been compiled by torch.jit{f' in {path}' if path else ''}, so that its code is "
                "not there to be exported; return the nn.Module that it was compiled from"
            )
        if each._backward_hooks or getattr(each, "_backward_pre_hooks", None):
            raise ModelError(
                f"the model {name} has a hook on the gradient of its module {path or 'as a whole'}, which devices "
                "would not run; leave it out, or write what it does into forward()"
            )
        if isinstance(each, nn.modules.batchnorm._NormBase) and each.momentum is None and each.track_running_stats:
            raise ModelError(
                f"the model {name} has momentum=None in {path}, which averages by a count that a graph cannot read; "
                "give it a number, such as 0.1"
            )
        if isinstance(each, nn.Embedding | nn.EmbeddingBag) and each.sparse:
            raise ModelError(f"the model {name} has sparse gradients in {path}; leave sparse=True out")
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for each, tensor in tensors:
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise ModelError(
                f"the model {name} has no weights: {each} is not initialised yet; initialise it, as lazy modules do "
                "when they are run once"
            )
        hooks = (getattr(tensor, "_backward_hooks", None), getattr(tensor, "_post_accumulate_grad_hooks", None))
        if any(hooks):
            raise ModelError(
                f"the model {name} has a hook on the gradient of {each}, which devices would not run; leave it out"
            )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ModelError(f"the model {name} has nothing to train: none of its parameters requires a gradient")
    _check_modes(module, name)


def _check_modes(module: nn.Module, name: str) -> None:
    """Changing the mode must change no weight, as merging adapters does: a graph has one set for both."""
    if all(getattr(each.train, "__func__", None) is nn.Module.train for each in module.modules()):
        return  # nothing of its own happens then, and a copy of a large model's weights is spared
    was_training = module.training
    before = {each: tensor.detach().clone() for each, tensor in _tensors(module)}
    for training in (False, True, was_training):
        module.train(training)
        for each, tensor in _tensors(module):
            if each not in before or (not torch.equal(tensor.detach(), before[each]) and tensor.equal(tensor)):
                raise ModelError(
                    f"the model {name} changes {each} when it is put into {'training' if training else 'evaluation'} "
                    "mode, as merging adapters does; keep weights the same in both modes"
                )


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
