"""Tasks for a real trainer, without a coordinator: costs and weights by the real model worker, data as IDX files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from coordinator.worker import ModelWorker
from edge_client.config import TrainerConfig
from edge_client.train_request import TrainRequest
from edge_client.trainer_process import Done, Failed, Measure, TrainerProcess
from fedepth.data.idx import write_idx
from fedepth.data.read import open_images
from fedepth.errors import ChildError
from fedepth.task import Budget, ModelCosts, ModelSpec, Outcome, Plan, Task, TrainingSpec

_SEED = 1


@dataclass(frozen=True)
class Prepared:
    """A model that is ready for tasks."""

    spec: ModelSpec
    training: TrainingSpec
    costs: ModelCosts
    weights: Path


async def prepare(worker: ModelWorker, spec: ModelSpec, training: TrainingSpec, folder: Path) -> Prepared:
    """Costs at this batch, traced once per folder, and initial weights."""
    name = f"{spec.name}-{spec.input_shape[-1]}".replace(":", "-")
    weights, costs_file = folder / f"{name}.safetensors", folder / f"{name}-{training.batch}.costs.json"
    if not (weights.exists() and costs_file.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        answer = await worker.request("prepare", model=spec, training=training, seed=_SEED, output=str(weights))
        costs_file.write_bytes(msgspec.json.encode(answer["costs"]))
    return Prepared(spec, training, msgspec.json.decode(costs_file.read_bytes(), type=ModelCosts), weights)


def write_digits(folder: Path, count: int) -> Path:
    """`count` real images of digits as IDX files, from the start again where there are fewer."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = open_images("digits", ModelSpec("digits-cnn", tuple("0123456789"), (1, 8, 8), (0.3,), (0.35,)))
    indices = np.arange(count) % len(digits)
    write_idx(folder / "train-images-idx3-ubyte", np.ascontiguousarray(digits.read(indices)[:, 0]))
    write_idx(folder / "train-labels-idx1-ubyte", digits.labels[indices].astype(np.uint8))
    return folder


def request(
    prepared: Prepared, plan: Plan, budget_bytes: int, data: Path, folder: Path, *, enforce: bool
) -> TrainRequest:
    """One task as the agent would hand it to its trainer."""
    task = Task(
        task_id="bench",
        attempt=1,
        job="bench",
        round=1,
        model=prepared.spec,
        training=prepared.training,
        policy=plan.policy,
        costs=prepared.costs,
        plan=plan,
        weights_digest="",
        weights_bytes=0,
        deadline_ms=0,
    )
    return TrainRequest(
        task=task,
        plan=plan,
        budget=fixed_budget(budget_bytes),
        weights=str(prepared.weights),
        data=str(data),
        output=str(folder / "output"),
        cache=str(folder / "cache"),
        device_id="bench",
        allowed_models=(prepared.spec.name,),
        enforce=enforce,
    )


def fixed_budget(budget_bytes: int) -> Budget:
    """A budget that does not depend on what is free."""
    return Budget(0, budget_bytes, (), 0, 0, 1.0, budget_bytes, budget_bytes)


async def train_once(request: TrainRequest, config: TrainerConfig) -> Done | Failed:
    """Runs a request in a fresh trainer; a trainer that dies counts as failed, with its last words."""
    trainer = await TrainerProcess.start(config)
    try:
        async for event in trainer.train(request):
            if isinstance(event, Measure):
                await trainer.answer(request.budget)
            elif isinstance(event, (Done, Failed)):
                return event
    except ChildError as error:
        return Failed(outcome=Outcome.TRAINER_DIED, message=str(error))
    finally:
        await trainer.kill()
    raise AssertionError("a trainer's events end with done or failed")
