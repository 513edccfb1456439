"""The proof that a graph is the module it came from: the same outputs, gradients and tensors, to the last bit.

What a graph cannot hold shows here: a custom backward pass, hooks, random numbers of Python or numpy, counters. So
every model, also one of the zoo, is compared before a job starts, and once more in the memory format of a trainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from fedepth.errors import ModelError
from fedepth.models.comparison import SEED, TOLERANCE, Outcome, Trial, backward, difference, gradients, relative
from fedepth.models.export import Exported, perturbed
from fedepth.models.original import Original
from fedepth.models.run import Model

# In another memory format other kernels run: logits are compared, for gradients of a hundred layers differ by percents.
LAYOUT_TOLERANCE = 1e-3
PROBABILITY_TOLERANCE = 1e-4
# A backward pass is linear in the gradient that comes in, and powers of two are exact: times these, the module's own
# gradients stay as they are. Where they do not, as with a clip in a custom backward pass, the graph's have to follow.
FACTORS = (2.0**-40, 2.0**20)


@contextmanager
def one_thread() -> Iterator[None]:
    """Kernels of several threads may sum in another order from run to run. A BatchNorm over a few values makes a lot of
    that: gradients of MobileNetV3 at batch 1 differed by 0.1 %, once in 25 times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def verify(module: nn.Module, exported: Exported, name: str) -> float:
    """Compares a graph with its module; returns the largest difference, relative to the size of what is compared.

    The trial in the trainer's memory format does not count into that: other kernels run there.

    Raises:
        ModelError: they differ; names the mode and the first tensor that does.
    """
    worst = 0.0
    graph = exported.graph
    original = Original(module, exported, name)
    try:
        original.draw_only_for_logits(exported.left_out)
        trained: Mapping[str, torch.Tensor] = {}  # as a step has left them: evaluation has to see what training wrote
        for trial in _trials(graph.smallest_micro_batch, graph.channels_last):
            moved = original.writable if trial.perturbed else ()
            start = {**original.start, **(perturbed(original.start, moved) if trial.training or not moved else trained)}
            inputs = exported.examples(trial.samples, trial.scale)
            again = original.step(start, inputs, trial)
            if trial.channels_last and original.draws(start, inputs, trial, again):
                continue  # random numbers come in the order in which values lie in memory
            apart, found = _compared(original, exported, again, start, inputs, trial)
            if not trial.channels_last:
                worst = max(worst, apart)
            if trial.training and trial.perturbed:
                trained = found.tensors
                for scaled in (replace(trial, factor=factor) for factor in FACTORS):
                    if not original.repeats(start, inputs, scaled, again):
                        outcome = original.step(start, inputs, scaled)
                        _compared(original, exported, outcome, start, inputs, scaled)
        _check_meaning(original, exported)
    finally:
        original.restore()
    return worst


def _check_meaning(original: Original, exported: Exported) -> None:
    """What nothing else would notice: a loss, an accuracy and an exported file come out all the same.

    Raises:
        ModelError: it returns probabilities instead of logits, or what it returns in evaluation for a sample depends on
            the other samples of its batch.
    """
    start = {**original.start, **perturbed(original.start, original.writable)}
    for trial in (Trial(4, 8.0, True, True), Trial(4, 8.0, False, True)):
        inputs = exported.examples(trial.samples, trial.scale)
        known = original.step(start, inputs, trial)
        logits = known.logits
        if bool((logits >= 0).all()) and bool((logits.sum(1) - 1).abs().max() < PROBABILITY_TOLERANCE):
            raise ModelError(
                f"the model {original.name} returns probabilities ({trial}), whose values add up to 1, and they would "
                "be taken for logits in losses and exports; return what it has before its softmax, in both modes"
            )
    if original.draws(start, inputs, trial, known):
        return
    alone = torch.cat([original.step(start, each, replace(trial, samples=1)).logits for each in torch.split(inputs, 1)])
    if (apart := relative(logits, alone)) > LAYOUT_TOLERANCE:
        raise ModelError(
            f"what the model {original.name} returns in evaluation for a sample depends on the other samples of its "
            f"batch, by {apart:.3g} of its size, so that its accuracy would say nothing of single samples. Has it "
            "a BatchNorm with track_running_stats=False, an attention layer without batch_first=True, or an operation "
            "along dimension 0? Let every sample be computed from itself in evaluation"
        )


def _compared(
    original: Original,
    exported: Exported,
    known: Outcome,
    start: Mapping[str, torch.Tensor],
    inputs: torch.Tensor,
    trial: Trial,
) -> tuple[float, Outcome]:
    """How far the graph is from the module's known outcome, and the graph's own; refuses what is too far."""
    found = _run_graph(exported, inputs, trial, start)
    apart, what = difference(known, found, with_gradients=not trial.channels_last)
    if apart <= (LAYOUT_TOLERANCE if trial.channels_last else TOLERANCE):
        return apart, found
    reason = _reason(original, exported, what, start, inputs, trial)
    raise ModelError(
        f"the graph of the model {original.name} differs from the model by {apart:.3g} in {what} ({trial}); {reason}"
    )


def _reason(
    original: Original,
    exported: Exported,
    what: str,
    start: Mapping[str, torch.Tensor],
    inputs: torch.Tensor,
    trial: Trial,
) -> str:
    """Of a difference in `what`, as far as it can be found out."""
    if caches := original.caches(start, inputs, trial):
        return (
            f"it keeps {caches[0]}, a tensor that it makes in its first run, for later ones, though they would make "
            "another; compute it in __init__() and register it as a buffer, or compute it in every run"
        )
    if trial.samples == 1:
        two, pair = replace(trial, samples=2), exported.examples(2, trial.scale)
        if difference(original.step(start, pair, two), _run_graph(exported, pair, two, start))[0] <= TOLERANCE:
            return (
                "it does not treat a batch of 1 as it treats others, as with an if on x.shape[0]; let it do the same "
                "whatever the batch size"
            )
    if what in exported.tensors:
        return (
            "it writes that in a way that torch.export does not record, as torch.utils.checkpoint does with a "
            "BatchNorm, which it runs twice; leave checkpointing to devices, which do it where memory asks for it"
        )
    return (
        "it does something that torch.export does not record, such as a hook, a custom backward pass, "
        "torch.utils.checkpoint with use_reentrant=True, or writing to what may be a view or a copy"
    )


def _trials(smallest: int, channels_last: bool) -> Iterator[Trial]:
    yield Trial(max(smallest, 1), 1.0, True, False)
    yield Trial(5, 8.0, True, True, gradient=1024.0)
    yield Trial(1, 1.0, False, True)
    yield Trial(4, 8.0, False, False)
    if channels_last:
        yield Trial(3, 1.0, False, False, channels_last=True)


def _run_graph(exported: Exported, inputs: torch.Tensor, trial: Trial, weights: Mapping[str, torch.Tensor]) -> Outcome:
    model = Model(exported.graph)
    fresh = {each: _laid_out(weights[each].clone(), trial) for each in exported.tensors}
    model.load(fresh.__getitem__, trainable=True)
    model.train(trial.training)
    torch.manual_seed(SEED)
    logits = model(_laid_out(inputs.clone(), trial))
    backward(logits, trial)
    return Outcome(
        logits.detach(),
        gradients(fresh, trial),
        {each: tensor.detach() for each, tensor in fresh.items()},
    )


def _laid_out(tensor: torch.Tensor, trial: Trial) -> torch.Tensor:
    if trial.channels_last and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor
