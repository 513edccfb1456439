"""What a device gains by distilling from a model of its own: its last task, trained once more with it and without."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.federation import Shard
from edge_client.config import TrainerConfig
from edge_client.measure.trial import TrialModel, trial_request, try_in_fresh_trainer
from edge_client.trainer.protocol import Failed
from fedepth.data.read import open_images
from fedepth.errors import ChildError
from fedepth.estimate.peak import needed_bytes
from fedepth.job import load_config, model_spec, policy, training_spec
from fedepth.models.run import Model
from fedepth.models.traced import read_traced
from fedepth.planning.planner import full_training_peak, make_plan
from fedepth.training.context import model_input
from fedepth.weights import Array, load_numpy

_ROOM = 1.15  # above what the plan needs with the default calibration


@dataclass(frozen=True)
class Gain:
    """One device's last task. The accuracies are of the update alone, before any average, on the job's test data."""

    device: str
    models: int
    accuracy: float
    accuracy_alone: float
    measured_peak_bytes: int
    measured_peak_bytes_alone: int


def gain_of(coordinator: Path, device: Path, shard: Shard, job: Path, round_number: int) -> Gain:
    """Trains the task of the device's last round again, from the same global weights, data and peer.

    Args:
        coordinator: the state directory of the coordinator.
        device: that of the device.

    Raises:
        ChildError: it could not be trained.
    """
    config = load_config(job)
    (weights,) = (coordinator / "weights").glob(f"round-{round_number - 1:04d}-*.safetensors")
    graph = coordinator / "model" / "graph.json"
    traced = read_traced(graph)
    results = []
    for mutual in (config.training.mutual, 1):
        training = replace(training_spec(config, round_number), mutual=mutual)
        budget = int(_ROOM * needed_bytes(full_training_peak(traced.costs, training, shard.samples, mutual).total))
        plan = make_plan(
            traced.costs,
            budget_bytes=budget,
            training=training,
            sample_count=shard.samples,
            policy=policy(config),
        )
        folder = device / f"again-{mutual}"
        trial = TrialModel(model_spec(config), training, traced.costs, graph, weights)
        request = trial_request(trial, plan, budget, shard.data, folder, enforce=True)
        task = replace(request.task, job=config.job.name, round=round_number)
        peers = sorted(device.glob(f"peers/*/{round_number - 1:08d}/*")) if mutual > 1 else []
        request = replace(request, task=task, peers=tuple(map(str, peers)), device_id=shard.name)
        end = asyncio.run(try_in_fresh_trainer(request, TrainerConfig(threads=1)))
        if isinstance(end, Failed):
            raise ChildError(f"{shard.name}'s task could not be trained again: {end.message}")
        tensors = load_numpy(weights)
        for part in end.result.parts:
            tensors.update(load_numpy(folder / "output" / f"part-{part.part:04d}.safetensors"))
        peak = max(stage.measured_peak_bytes for stage in end.result.stages)
        results.append((plan.models, _accuracy(Model(traced.graph), tensors, config.test_data, trial), peak))
        shutil.rmtree(folder)
    (models, accuracy, peak), (_, alone, peak_alone) = results
    return Gain(shard.name, models, accuracy, alone, peak, peak_alone)


def _accuracy(model: Model, tensors: dict[str, Array], data: str, trial: TrialModel) -> float:
    model.load(lambda name: torch.from_numpy(tensors[name]))
    model.train(False)
    images = open_images(data, trial.spec, "test")
    with torch.inference_mode():
        x = model_input(trial.spec, torch.from_numpy(images.read(np.arange(len(images)))))
        return float(np.mean(model(x).argmax(1).numpy() == images.labels))
