"""Whether training a whole model at the job's batch fails under a limit: tried with the real trainer, not assumed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console

from coordinator.config import load_config
from coordinator.schedule import training_spec
from edge_client.config import TrainerConfig
from edge_client.train_request import TrainRequest
from edge_client.trainer_process import Failed, Measure, TrainerProcess
from fedepth.child import Child, module_argv
from fedepth.data.idx import write_idx
from fedepth.data.read import open_images
from fedepth.errors import ChildError
from fedepth.planning.planner import full_training_peak
from fedepth.sizes import format_size
from fedepth.task import Budget, CachePlace, ModelCosts, ModelSpec, PeakComponents, Plan, Policy, Stage, Task


def fails_in_full(folder: Path, spec: ModelSpec, job: Path, tiers: Mapping[str, int], console: Console) -> list[str]:
    """Tries full training under each tier's limit and returns the tiers on which it fails."""
    return asyncio.run(_try_tiers(folder, spec, job, tiers, console))


async def _try_tiers(folder: Path, spec: ModelSpec, job: Path, tiers: Mapping[str, int], console: Console) -> list[str]:
    digits = open_images("digits", spec, "train")
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    write_idx(data / "train-images-idx3-ubyte", np.ascontiguousarray(digits.read(np.arange(len(digits)))[:, 0]))
    write_idx(data / "train-labels-idx1-ubyte", digits.labels.astype("uint8"))
    weights = folder / "weights.safetensors"
    training = replace(training_spec(load_config(job), 1), local_epochs=1)
    worker = await Child.start("model worker", module_argv("coordinator.model_worker"))
    await worker.receive()
    await worker.send({"do": "prepare", "model": spec, "training": training, "seed": 1, "output": str(weights)})
    answer = await worker.receive()
    while "ok" not in answer:
        if "error" in answer:
            raise ChildError(f"the model worker failed: {answer['error']['message']}")
        answer = await worker.receive()
    await worker.stop()
    costs = msgspec.convert(answer["ok"]["costs"], ModelCosts)
    peak = full_training_peak(costs, training, len(digits))
    console.print(
        f"training all of {spec.name} at batch {training.batch} is predicted to need {format_size(peak.total)}"
    )
    task = Task(
        task_id="full",
        attempt=1,
        job="full-training",
        round=1,
        model=spec,
        training=training,
        policy=Policy.PAPER,
        costs=costs,
        plan=_full_plan(costs, training.batch),
        weights_digest="",
        weights_bytes=0,
        deadline_ms=0,
    )
    failing = []
    for tier, limit in tiers.items():
        verdict = await _try(folder / tier, task, limit, weights, data)
        console.print(f"  {tier:<7} {format_size(limit):>10}: {verdict or 'trains'}")
        if verdict:
            failing.append(tier)
    return failing


def _full_plan(costs: ModelCosts, batch: int) -> Plan:
    """Everything in one stage. It claims to need nothing: a plan that says what it needs would not be tried at all."""
    stage = Stage(0, len(costs.units) - 1, batch, CachePlace.DISK, batch, PeakComponents(0, 0, 0, 0, 0, 0, 0))
    return Plan((stage,), (), Policy.PAPER, 0)


async def _try(folder: Path, task: Task, limit: int, weights: Path, data: Path) -> str:
    """Empty if the whole model trains under `limit`, else the error that it meets."""
    trainer = await TrainerProcess.start(TrainerConfig(threads=2))
    budget = Budget(0, limit, (), 0, 0, 1.0, limit, limit)
    request = TrainRequest(
        task=task,
        plan=task.plan,
        budget=budget,
        weights=str(weights),
        data=str(data),
        output=str(folder / "output"),
        cache=str(folder / "cache"),
        device_id="full",
        allowed_models=(),
        enforce=True,
    )
    try:
        async for event in trainer.train(request):
            if isinstance(event, Measure):
                await trainer.answer(budget)
            elif isinstance(event, Failed):
                return event.message
    except ChildError as error:
        return str(error)
    finally:
        await trainer.kill()
    return ""
