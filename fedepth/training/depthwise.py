"""Depth-wise training of one task (arXiv 2303.04887, sections 4.1 and 4.2).

For every stage: compute the block's inputs once from those of the stage before, train the block together with the head
for the job's local epochs, freeze it, write it out. Only the weights that a stage needs are in memory; everything else
of the model stays on the meta device and in the weights file.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedepth.data.read import Images
from fedepth.data.transforms import augment, views_rng
from fedepth.errors import OverBudgetError, PlanError
from fedepth.memory.meter import DataLimit, Meter
from fedepth.memory.predict import effective_batch
from fedepth.models.skip import skip
from fedepth.models.split import SplitModel, Unit, assign, release
from fedepth.planning.planner import make_plan
from fedepth.sizes import format_size
from fedepth.task import Plan, Stage, StageResult, Task
from fedepth.training.cache import Cache, open_cache
from fedepth.training.optimizers import optimizer_step
from fedepth.weights import Reader, save

# Address space (what RLIMIT_DATA counts) runs ahead of resident memory: thread arenas, partly used mappings.
DATA_OVERHEAD_BYTES = 16 << 20
_OUT_OF_MEMORY = re.compile(
    r"(can't allocate memory|bad_alloc|out of memory|could not create a memory|cannot allocate)", re.I
)
_WANTED = re.compile(r"tried to allocate (\d+) bytes")


class Hooks(Protocol):
    """What the trainer asks and tells while it works."""

    def measure(self, stage: int, held_bytes: int) -> int:
        """The budget in bytes as it is now; `held_bytes` is what this process holds above its baseline."""

    def stage_started(self, index: int, count: int, stage: Stage) -> None: ...

    def progress(self, index: int, count: int, stage: Stage, epoch: int, loss: float) -> None: ...

    def stage_done(self, result: StageResult) -> None: ...


@dataclass(frozen=True)
class Work:
    """One task on one device, opened.

    Attributes:
        split: the model, on the meta device.
        enforce: set RLIMIT_DATA, and stop a stage whose first step goes over the budget.
    """

    task: Task
    plan: Plan
    split: SplitModel
    weights: Reader
    images: Images
    output: Path
    cache: Path
    device_id: str
    device: torch.device
    channels_last: bool
    enforce: bool = True


@dataclass(frozen=True)
class Trained:
    """What came of a task: the plan that was really trained, and one file per block and one for the head."""

    plan: Plan
    stages: tuple[StageResult, ...]
    parts: tuple[Path, ...]


def train(work: Work, meter: Meter, hooks: Hooks) -> Trained:
    """Trains every stage inside the budget that is measured before it.

    Raises:
        PlanError: nothing fits before the first stage.
        OverBudgetError: a stage met its limit.
    """
    split = work.split
    waiting = list(work.plan.stages)
    done: list[Stage] = []
    results: list[StageResult] = []
    parts: list[Path] = []
    cache: Cache | None = None
    labels = torch.from_numpy(work.images.labels.astype(np.int64))
    load(split, split.head, work, trainable=True)
    while waiting:
        budget = hooks.measure(len(done), meter.held_bytes)
        waiting = _fit(work, waiting, done, budget)
        if not waiting:
            break
        stage = waiting.pop(0)
        count = len(done) + 1 + len(waiting)
        hooks.stage_started(len(done), count, stage)
        meter.reset()
        started = time.monotonic()
        with ExitStack() as limits:
            if work.enforce:
                limits.enter_context(DataLimit(meter.baseline.data_bytes, budget, DATA_OVERHEAD_BYTES))
            try:
                cache = _build(work, stage, done[-1] if done else None, cache)
                run = _StageRun(work, stage, cache, labels, final=not waiting)
                losses = run.train(meter, budget, len(done), partial(hooks.progress, len(done), count, stage))
            except (RuntimeError, MemoryError) as error:
                raise _over_budget(error, len(done), stage, budget, meter) from error
            parts.append(_write(work, len(parts), [split.units[i] for i in range(stage.first, stage.last + 1)]))
        results.append(
            StageResult(
                first=stage.first,
                last=stage.last,
                micro_batch=stage.micro_batch,
                predicted_peak_bytes=stage.predicted_peak_bytes,
                measured_peak_bytes=_peak_bytes(meter, work.device),
                measured_anonymous_bytes=meter.anonymous_peak_bytes,
                budget_bytes=budget,
                loss_first=losses[0],
                loss_last=losses[-1],
                steps=run.steps,
                samples_seen=run.samples_seen,
                seconds=time.monotonic() - started,
            )
        )
        hooks.stage_done(results[-1])
        done.append(stage)
    if cache is not None:
        cache.close()
    parts.append(_write(work, len(parts), [split.head]))
    for unit in (*split.units, split.head):
        release(unit)
    trained = {unit for stage in done for unit in range(stage.first, stage.last + 1)}
    untrained = tuple(unit for unit in range(len(split.units)) if unit not in trained)
    return Trained(replace(work.plan, stages=tuple(done), untrained=untrained), tuple(results), tuple(parts))


def load(split: SplitModel, unit: Unit, work: Work, *, trainable: bool) -> None:
    """Reads a unit's tensors from the weights file to the device, unless they are there already."""
    for name, present in (*unit.parameters(), *unit.buffers()):
        if not present.is_meta:
            continue
        tensor = torch.from_numpy(work.weights.read(name)).to(work.device)
        if work.channels_last and tensor.dim() == 4:
            tensor = tensor.to(memory_format=torch.channels_last)
        assign(split, name, tensor, requires_grad=trainable and name in unit.parameter_names)


def _fit(work: Work, waiting: list[Stage], done: list[Stage], budget: int) -> list[Stage]:
    """The stages still to train, planned anew if memory has shrunk below what they need."""
    if max(stage.predicted_peak_bytes for stage in waiting) <= budget:
        return waiting
    try:
        plan = make_plan(
            work.task.costs,
            budget_bytes=budget,
            training=work.task.training,
            sample_count=len(work.images),
            policy=work.task.policy,
            done=done[-1] if done else None,
        )
    except PlanError:
        if not done:
            raise
        return []  # what is trained so far is a valid partial update; the rest keeps its global value
    return list(plan.stages)


def _build(work: Work, stage: Stage, previous: Stage | None, source: Cache | None) -> Cache:
    """The inputs of `stage`, computed once: augmented views before unit 0, activations behind frozen units after."""
    count, batch = len(work.images), stage.build_batch
    raw = stage.first == 0
    target = open_cache(
        stage.cache,
        work.cache / f"inputs-{stage.first}",
        count,
        work.split.input_shapes[stage.first],
        torch.uint8 if raw else torch.float32,
    )
    start = previous.first if previous else 0
    units = [work.split.units[index] for index in range(start, stage.first)]
    rng = views_rng(work.task.training.seed, work.task.round, work.device_id)
    for unit in units:
        load(work.split, unit, work, trainable=False)
        unit.train(False)  # BatchNorm of frozen units uses its running statistics
    with torch.no_grad():
        for begin in range(0, count, batch):
            indices = np.arange(begin, min(begin + batch, count))
            if source is None:
                views = augment(work.images.read(indices), work.task.training.augmentation, rng)
                x = torch.from_numpy(views)
            else:
                x = source.read(torch.from_numpy(indices))
            if not raw:
                x = _to_device(work, x, from_pixels=start == 0)
                for unit in units:
                    x = unit(x)
                x = x.cpu()
            target.write(begin, x)
            del x
    for unit in units:
        release(unit)
    if source is not None:
        source.close()
    return target


def _to_device(work: Work, x: torch.Tensor, *, from_pixels: bool) -> torch.Tensor:
    """A cached batch as the unit wants it: float32, normalised if it holds pixels, in the model's memory format."""
    x = x.to(work.device)
    if from_pixels:
        spec = work.task.model
        mean = torch.tensor(spec.mean, device=work.device).view(-1, 1, 1)
        std = torch.tensor(spec.std, device=work.device).view(-1, 1, 1)
        x = x.float().div_(255.0).sub_(mean).div_(std)
    if work.channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x


class _StageRun:
    """The training loop of one stage."""

    def __init__(self, work: Work, stage: Stage, cache: Cache, labels: torch.Tensor, *, final: bool) -> None:
        self._work = work
        self._stage = stage
        self._cache = cache
        self._labels = labels
        split = work.split
        self._units = [split.units[index] for index in range(stage.first, stage.last + 1)]
        for unit in self._units:
            load(split, unit, work, trainable=True)
            unit.train(True)
        split.head.train(True)
        # The head sees zero-padded channels until the last stage; their statistics must not reach its BatchNorm.
        _track_statistics(split.head, track=final)
        self._parameters = [p for unit in (*self._units, split.head) for _, p in unit.parameters()]
        training = work.task.training
        self._reference = [p.detach().clone() for p in self._parameters] if training.proximal_mu > 0 else []
        self._state: list[list[torch.Tensor]] = [[] for _ in self._parameters]
        self._update = optimizer_step(training.optimizer)
        self.steps = 0
        self.samples_seen = 0

    def train(self, meter: Meter, budget: int, index: int, report: Callable[[int, float], None]) -> list[float]:
        """Runs all epochs; returns the mean loss of each."""
        spec = self._work.task.training
        batch = effective_batch(self._work.task.costs, spec, len(self._labels))
        shuffle = torch.Generator().manual_seed(_seed(self._work, index))
        torch.manual_seed(_seed(self._work, index) ^ 1)  # dropout
        losses: list[float] = []
        for epoch in range(spec.local_epochs):
            total, batches = 0.0, 0
            told = time.monotonic()
            for indices in epoch_batches(len(self._labels), batch, shuffle):
                total += self._step(indices)
                batches += 1
                meter.sample()
                if self.steps <= 2 and self._work.enforce:
                    _check(meter, self._work.device, budget, index, self._stage)
                if time.monotonic() - told > 1.0:
                    told = time.monotonic()
                    report(epoch, total / batches)
            losses.append(total / batches)
            report(epoch + 1, losses[-1])
        self._state.clear()
        for parameter in self._parameters:
            parameter.grad = None
        return losses

    def _step(self, indices: torch.Tensor) -> float:
        """One optimizer step on `indices`, in micro-batches whose gradients accumulate."""
        work, stage = self._work, self._stage
        pieces = -(-len(indices) // stage.micro_batch)
        loss_sum = 0.0
        for piece in torch.tensor_split(indices, pieces):
            x = _to_device(work, self._cache.read(piece), from_pixels=stage.first == 0)
            for unit in self._units:
                x = unit(x)
            logits = work.split.head(skip(x, work.split.head_shape))
            targets = self._labels[piece].to(work.device)
            loss = functional.cross_entropy(logits, targets, reduction="sum") / len(indices)
            del x, logits
            torch.autograd.backward(loss)
            loss_sum += float(loss.detach())
        spec = work.task.training
        self.steps += 1
        with torch.no_grad():
            for position, parameter in enumerate(self._parameters):
                gradient = parameter.grad
                if gradient is None:
                    continue
                if self._reference:
                    gradient.add_(parameter - self._reference[position], alpha=spec.proximal_mu)
                parameter.grad = None
                self._update(parameter, gradient, self._state[position], self.steps, spec)
        self.samples_seen += len(indices)
        return loss_sum


def epoch_batches(count: int, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Index batches of one epoch, all of one size: the last is filled from the start of the same permutation.

    One size keeps the kernels' cached scratch small, and no sample of a small shard is ever dropped.
    """
    order = torch.randperm(count, generator=generator)
    positions = torch.arange(-(-count // batch) * batch) % count
    yield from torch.split(order[positions], batch)


def _track_statistics(unit: Unit, *, track: bool) -> None:
    for module in (module for top in unit.modules for module in top.modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.1 if track else 0.0


def _write(work: Work, number: int, units: list[Unit]) -> Path:
    """The tensors of `units` as one immutable part."""
    path = work.output / f"part-{number:04d}.safetensors"
    tensors = [named for unit in units for named in (*unit.parameters(), *unit.buffers())]
    save(path, {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors})
    for unit in units:
        for _, parameter in unit.parameters():
            parameter.requires_grad_(unit is work.split.head)
    return path


def _peak_bytes(meter: Meter, device: torch.device) -> int:
    """The stage's peak above the baseline: host memory, or the GPU's where that is larger."""
    if device.type != "cuda":
        return meter.peak_bytes
    reserved = torch.cuda.max_memory_reserved(device)
    if torch.cuda.get_device_properties(device).is_integrated:
        return meter.peak_bytes + reserved  # unified memory: both come out of the same bytes
    return max(meter.peak_bytes, reserved)


def _check(meter: Meter, device: torch.device, budget: int, index: int, stage: Stage) -> None:
    peak = _peak_bytes(meter, device)
    if peak > budget:
        raise OverBudgetError(
            f"stage {index} (units {stage.first}-{stage.last}) took {format_size(peak)} in its first steps, "
            f"predicted were {format_size(stage.predicted_peak_bytes)}, the budget is {format_size(budget)}",
            stage=index,
            miss_bytes=peak - budget,
        )


def _over_budget(error: BaseException, index: int, stage: Stage, budget: int, meter: Meter) -> BaseException:
    """An allocator's error as OverBudgetError; any other error as it is."""
    text = str(error)
    if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(text):
        return error
    wanted = _WANTED.search(text)
    # The stage's tensors are gone by now; the high-water mark still tells what it held when the request failed.
    needed = meter.peak_bytes + (int(wanted.group(1)) if wanted else 0)
    return OverBudgetError(
        f"stage {index} (units {stage.first}-{stage.last}, micro-batch {stage.micro_batch}) met the limit of "
        f"{format_size(budget)}: {text.splitlines()[0] if text else type(error).__name__}",
        stage=index,
        miss_bytes=max(0, needed - budget),
    )


def _seed(work: Work, index: int) -> int:
    """The same for the same job, round, device and stage; different for any other."""
    text = f"{work.task.training.seed}/{work.task.round}/{work.device_id}/{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
