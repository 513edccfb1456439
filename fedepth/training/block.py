"""The training of one block: steps in micro-batches, each parameter updated as soon as its gradient is complete.

With peers (mutual distillation, arXiv 2303.04887, section 4.3) several models take each step on the same samples. All
of them say first what they make of a micro-batch; then one after the other runs forwards and backwards against what the
others have said, so that activations of one model at a time are there. The first is heard while it runs itself: the
price of a peer is one more forward pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import torch

from fedepth.estimate.peak import batches_per_epoch, pieces_of
from fedepth.plan import Stage
from fedepth.training import checkpoint
from fedepth.training.cache import Inputs
from fedepth.training.context import TrainingContext, load, read, to_device
from fedepth.training.objective import Head, Teachers, objective
from fedepth.training.optimizers import new_state, optimizer_step
from fedepth.training.pressure import MicroBatch
from fedepth.training.views import views


class BlockTraining:
    """A block and its exit, loaded and trainable, until `close`.

    Attributes:
        peers: the same block of other models, which train with it step by step.
        trained: the units, and the head where it is trained.
        smallest_micro_batch: the smallest so far.
        steps: optimizer steps so far.
        samples_seen: samples so far, counted once an epoch.
    """

    def __init__(
        self,
        context: TrainingContext,
        stage: Stage,
        inputs: Inputs,
        labels: torch.Tensor,
        index: int,
        micro_batch: MicroBatch,
        *,
        trains_head: bool,
        distilled: Inputs | None = None,
    ) -> None:
        """
        Args:
            index: the place of the stage in its task.
            trains_head: else the head stays as it is, where it is the exit.
            distilled: logits of all samples that the block learns from beside the labels.
        """
        self.peers: Sequence[BlockTraining] = ()
        self.smallest_micro_batch = micro_batch.now
        self._micro_batch = micro_batch
        self.steps = 0
        self.samples_seen = 0
        self._epoch = -1
        self._context = context
        self._stage = stage
        self._inputs = inputs
        self._labels = labels
        self._distilled = distilled
        self._shuffle = torch.Generator().manual_seed(_seed(context, index))
        torch.manual_seed(_seed(context, index) ^ 1)  # dropout
        model = context.model
        self._units = list(model.units[stage.first : stage.last + 1])
        self._suffix = list(model.units[stage.last + 1 :]) if stage.frozen_suffix else []
        for unit in self._units:
            load(context, unit, trainable=True)
            unit.training = True
        for unit in self._suffix:
            load(context, unit, trainable=False)
            unit.training = False
        self._exit = model.exit(stage.last, frozen_suffix=stage.frozen_suffix)
        load(context, self._exit, trainable=True)
        self._exit.training = True
        is_head = self._exit is model.head
        trains_exit = trains_head or not is_head
        self.trained = [*self._units, *([self._exit] if trains_exit else [])]
        for _, parameter in self._exit.parameters():
            parameter.requires_grad_(trains_exit)
        # Behind a skip connection the head sees zeros for channels; such statistics must not reach its BatchNorm.
        true_features = stage.last == len(model.units) - 1 or stage.frozen_suffix
        self._written = self._exit.copies_of_written() if is_head and not true_features else {}
        self._update = optimizer_step(context.task.training.optimizer)
        self._last_piece = True
        named = [pair for unit in self.trained for pair in unit.parameters()]
        self._parameters = [parameter for _, parameter in named]
        # The optimizer runs inside the backward pass, so that the gradients of a model never lie side by side.
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._updater(name, parameter))  # type: ignore[no-untyped-call]
            for name, parameter in named
        ]
        # As large as the part of an epoch's order that a rehearsal, which draws few samples, does not have.
        self._order_beyond = torch.zeros(context.cached_samples - len(labels), dtype=torch.int64)

    def epoch_batches(self) -> tuple[torch.Tensor, ...]:
        """Index batches of the next epoch."""
        for each in (self, *self.peers):
            each._epoch += 1
        task = self._context.task
        count = len(self._labels)
        return epoch_batches(count, batches_per_epoch(self._context.costs, task.training, count), self._shuffle)

    def step(self, indices: torch.Tensor) -> float:
        """One optimizer step on `indices`, in micro-batches whose gradients accumulate. Returns the mean loss."""
        models = (self, *self.peers)
        for each in models:
            each.steps += 1
        micro_batch = self._micro_batch.now
        self.smallest_micro_batch = min(self.smallest_micro_batch, micro_batch)
        pieces = torch.tensor_split(indices, pieces_of(self._context.costs, len(indices), micro_batch))
        loss_sum = 0.0
        for number, piece in enumerate(pieces, 1):
            for each in models:
                each._last_piece = number == len(pieces)
            loss_sum += self._together(piece, len(indices)) if self.peers else self._accumulate(piece, len(indices))
        self.samples_seen += len(indices)
        return loss_sum

    def has_finite_inputs(self, indices: torch.Tensor) -> bool:
        """Whether the samples at `indices` are finite as they are kept."""
        pieces = torch.split(indices, self._micro_batch.now)
        return all(bool(torch.isfinite(self._inputs.read(piece)).all()) for piece in pieces)

    def close(self) -> None:
        """Lets go of gradients, optimizer state and weights; those stay where the units hold them."""
        for peer in self.peers:
            peer.close()
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
        for unit in self._suffix:
            unit.release()
        self._hooks.clear()
        self._parameters.clear()

    def _together(self, piece: torch.Tensor, batch: int) -> float:
        """The passes of all models on one micro-batch; the loss of the first."""
        device = self._context.device
        random_states: list[torch.Tensor] = []
        said: list[torch.Tensor] = []
        own: list[torch.Tensor] = []
        for peer in self.peers:
            random_states.append(checkpoint.random_state(device))
            said.append(peer._say(piece))
        loss = self._accumulate(piece, batch, said, heard=own)
        for number, peer in enumerate(self.peers):
            with checkpoint.random_numbers_of(random_states[number], device):
                peer._accumulate(piece, batch, [*own, *said[:number], *said[number + 1 :]])
        return loss

    def _say(self, piece: torch.Tensor) -> torch.Tensor:
        """The logits of a micro-batch as the pass in training will have them, before which nothing changes."""
        with torch.no_grad():
            x = self._read(piece)
            for unit in (*self._units, *self._suffix):
                x = unit(x, unit.copies_of_written() if unit.training else None)
            head = partial(self._exit, written=self._written or self._exit.copies_of_written())
            return self._logits(x, head)

    def _read(self, piece: torch.Tensor) -> torch.Tensor:
        # Anew for every pass: the first unit may change its input in place.
        x, is_data = self._inputs.read(piece), self._stage.first == 0
        if is_data:
            x = views(self._context, x, piece, self._epoch)
        return to_device(self._context, x, from_data=is_data)

    def _accumulate(
        self,
        piece: torch.Tensor,
        batch: int,
        others: Sequence[torch.Tensor] = (),
        heard: list[torch.Tensor] | None = None,
    ) -> float:
        """Forward and backward pass of one micro-batch; the sum of its losses divided by `batch`.

        Args:
            others: what other models say of it.
            heard: what this one says of it is added here.
        """
        context = self._context
        targets = self._labels[piece].to(context.device)
        head = partial(self._exit, written=self._written)
        teachers = self._teachers(piece, others)

        def loss_of(output: torch.Tensor) -> torch.Tensor:
            logits = self._logits(output, head)
            if heard is not None:
                heard.append(logits.detach())
            return objective(logits, targets=targets, batch=batch, teachers=teachers)

        x = self._read(piece)
        # A frozen suffix ends with the head's own input, from which the skip connection is the identity.
        units = (*self._units, *self._suffix)
        if self._stage.checkpoint:
            return float(checkpoint.forward_backward(units, x, loss_of))
        for unit in units:
            x = unit(x)
        loss = loss_of(x)
        del x
        if loss.requires_grad:  # not where the model's author froze the whole block, and the head stays
            torch.autograd.backward(loss)
        return float(loss.detach())

    def _logits(self, output: torch.Tensor, head: Head) -> torch.Tensor:
        last = (*self._units, *self._suffix)[-1]
        return self._context.exit(output, head=head, head_shape=self._exit.unit.input_shape, channels=last.channels)

    def _teachers(self, piece: torch.Tensor, others: Sequence[torch.Tensor]) -> list[Teachers]:
        """What the global model and other models say of the samples at `piece`."""
        spec = self._context.task.training
        found = []
        if self._distilled is not None:
            logits = self._distilled.read(piece).to(self._context.device)
            found.append(Teachers((logits,), spec.distil_weight, spec.distil_temperature))
        if others:
            found.append(Teachers(tuple(others), spec.mutual_weight, spec.mutual_temperature))
        return found

    def _updater(self, name: str, parameter: torch.Tensor) -> Callable[[torch.Tensor], None]:
        spec = self._context.task.training
        # The global weights, also for the head, which earlier stages of the task have trained already.
        reference = read(self._context, self._context.weights, name) if spec.proximal_mu > 0 else None
        state = new_state(parameter.detach(), spec)

        def update(_: torch.Tensor) -> None:
            gradient = parameter.grad
            if not self._last_piece or gradient is None:
                return
            parameter.grad = None
            # Nothing is recorded for gradients within a backward pass.
            if reference is not None:
                gradient.add_(parameter - reference, alpha=spec.proximal_mu)
            self._update(parameter, gradient, state, self.steps, spec)

        return update


def epoch_batches(count: int, batches: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Index batches of one epoch: every sample once, in batches whose sizes differ by at most one.

    Almost equal sizes keep the kernels' cached scratch small, and no step weighs its samples more than another.
    """
    return torch.tensor_split(torch.randperm(count, generator=generator), batches)


def _seed(context: TrainingContext, index: int) -> int:
    """The same for the same job, round, device and stage; different for any other."""
    text = f"{context.task.training.seed}/{context.task.round}/{context.device_id}/{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
