"""Training that is tried and measured, not delivered: a real trainer, with real limits, on images of noise.

What memory and time a stage takes does not depend on what the images show.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_client.config import TrainerConfig
from edge_client.trainer.client import TrainerProcess
from edge_client.trainer.protocol import Done, Event, Failed, Measure, TrainRequest
from fedepth.budget import Budget
from fedepth.costs import ModelCosts
from fedepth.data.idx import write_idx, write_idx_items
from fedepth.errors import ChildError
from fedepth.plan import Plan
from fedepth.task import InputType, ModelSpec, Outcome, Task, TrainingSpec

_SEED = 1
_SMALLEST_VOCABULARY = 8


@dataclass(frozen=True)
class TrialModel:
    """A model that is ready for trials: what it costs on this device, and files with its graph and weights."""

    spec: ModelSpec
    training: TrainingSpec
    costs: ModelCosts
    graph: Path
    weights: Path


MOST_SAMPLES = 1 << 24  # of noise, which is written to the disk


def write_noise(folder: Path, spec: ModelSpec, count: int) -> Path:
    """`count` random inputs of the model as IDX files, written one at a time: images of one channel, or what else it
    takes."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = spec.input_shape[1:] if len(spec.input_shape) == 3 else spec.input_shape
    noise = random.Random(_SEED)
    size = math.prod(shape)
    # Token ids stay small, so that any vocabulary has them.
    small = bytes(each % _SMALLEST_VOCABULARY for each in range(256))
    tokens = spec.input_type is InputType.TOKENS
    items = (noise.randbytes(size).translate(small) if tokens else noise.randbytes(size) for _ in range(count))
    labels = memoryview(bytes(index % min(len(spec.classes), 256) for index in range(count)))  # IDX has bytes
    write_idx_items(folder / f"train-images-idx{1 + len(shape)}-ubyte", (count, *shape), items)
    write_idx(folder / "train-labels-idx1-ubyte", labels)
    return folder


def trial_request(
    model: TrialModel, plan: Plan, budget_bytes: int, data: Path, folder: Path, *, enforce: bool
) -> TrainRequest:
    """One task as the agent would hand it to its trainer. Its files go to `folder`."""
    task = Task(
        task_id="trial",
        attempt=1,
        job="trial",
        round=1,
        model=model.spec,
        training=model.training,
        policy=plan.policy,
        plan=plan,
        graph_digest=str(model.graph),
        graph_bytes=0,
        weights_digest="",
        weights_bytes=0,
        run_id="",
    )
    return TrainRequest(
        task=task,
        plan=plan,
        budget=fixed_budget(budget_bytes),
        graph=str(model.graph),
        calibration=model.costs.calibration,
        weights=str(model.weights),
        data=str(data),
        output=str(folder / "output"),
        cache=str(folder / "cache"),
        peers_output=str(folder / "peers") if plan.models > 1 else "",
        device_id="trial",
        enforce=enforce,
    )


def fixed_budget(budget_bytes: int) -> Budget:
    """A budget that does not depend on what is free."""
    return Budget(0, budget_bytes, (), 0, 0, 1.0, budget_bytes, budget_bytes)


async def try_training(
    trainer: TrainerProcess, request: TrainRequest, on_event: Callable[[Event], None] = lambda _: None
) -> Done | Failed:
    """Runs a request in a trainer; one that dies counts as failed, with its last words."""
    try:
        async for event in trainer.train(request):
            if isinstance(event, Measure):
                await trainer.answer(request.budget)
            elif isinstance(event, (Done, Failed)):
                return event
            else:
                on_event(event)
    except ChildError as error:
        return Failed(outcome=Outcome.TRAINER_DIED, message=str(error))
    raise AssertionError("a trainer's events end with done or failed")


async def try_in_fresh_trainer(request: TrainRequest, config: TrainerConfig) -> Done | Failed:
    """The same in a process of its own."""
    trainer = await TrainerProcess.start(config)
    try:
        return await try_training(trainer, request)
    finally:
        await trainer.kill()
