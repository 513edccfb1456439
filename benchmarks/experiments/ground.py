"""What an experiment stands on: data, a model that is ready for plans and trials, and the set-ups to compare."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.runs import Scale, job_text
from edge_client.config import TrainerConfig
from edge_client.measure.trial import TrialModel, trial_request, try_in_fresh_trainer, write_noise
from edge_client.trainer.protocol import Failed
from fedepth.data.digits import load_digits
from fedepth.data.read import Labels
from fedepth.errors import ChildError
from fedepth.estimate.peak import build_peak, needed_bytes
from fedepth.files import write_atomically
from fedepth.job import load_config, model_spec, training_spec
from fedepth.models.traced import write_traced
from fedepth.plan import CachePlace, Plan, Policy
from fedepth.planning.needs import raw_limit
from fedepth.planning.planner import Planner
from fedepth.planning.search import Found
from fedepth.planning.ways import Way
from fedepth.prepare import trace_model
from fedepth.weights import save

WEIGHT_DECAY = 5e-4
EVERYTHING = 1 << 50
_WHOLE = Fraction(1)


@dataclass(frozen=True)
class Setup:
    """One of the things that an experiment compares.

    Attributes:
        plans: of every client by its number; none where the planner is asked.
        width: of the network that is trained, as a share of the model's.
        drawn_from: the clients that may be drawn; none for all.
        epochs: of a task, instead of the scale's.
        facts: figures that are known before it is run.
    """

    name: str
    plans: Sequence[Plan] = ()
    width: Fraction = _WHOLE
    drawn_from: Sequence[int] = ()
    epochs: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


def digits_labels() -> Labels:
    """Of the training images among scikit-learn's digits."""
    return load_digits("train")[1]


class Ground:
    """The model and the clients of one experiment. What takes long or is measured is remembered in `folder`: a run that
    goes on has to find the plans that it began with."""

    def __init__(self, scale: Scale, folder: Path, data: str, say: Callable[[str], None]) -> None:
        self.scale = scale
        self.folder = folder
        self.data = data
        self._say = say
        job = folder / "ground.toml"
        training = f"weight_decay = {WEIGHT_DECAY}"
        job.write_text(job_text(replace(scale, epochs=1), name="ground", seed=1, data=data, training=training))
        config = load_config(job)
        self.spec, self.training = model_spec(config), training_spec(config, 1)
        self.samples = (scale.images or len(digits_labels())) // scale.clients

    @cached_property
    def whole(self) -> TrialModel:
        """The experiment's model."""
        return self.network(_WHOLE)

    def network(self, width: Fraction) -> TrialModel:
        """One with so many times as many channels in every layer."""
        self._say(f"tracing {self.scale.model}, {width} as wide")
        prepared = trace_model(self.spec, self.training, seed=1, width=width)
        folder = self.folder / "models" / str(width).replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        graph, weights = folder / "graph.json", folder / "weights.safetensors"
        write_traced(graph, prepared.traced)
        save(weights, {name: tensor.detach().numpy() for name, tensor in prepared.tensors.items()})
        return TrialModel(self.spec, self.training, prepared.traced.costs, graph, weights)

    def pinned(self, *blocks: tuple[int, int], model: TrialModel | None = None) -> Plan:
        """A plan of these blocks, first and last units, with the job's batch in one piece and all caches on disk. Units
        before the first block are untrained. Its budget is what that needs at least."""
        costs = (model or self.whole).costs
        planner = Planner(costs, self.training, self.samples, Policy.PAPER)
        way = Way(planner.ways.batch, checkpoint=False, work=0.0)
        found = [Found(first, last, way, CachePlace.DISK, frozen_suffix=False) for first, last in blocks]
        trained = [planner.trained_peak(each).total for each in found]
        sources = (0, *(first for first, _ in blocks))
        built = [
            build_peak(costs, source, each.first, 1, source_bytes=0, cache_bytes=0, streamed=True).total
            for source, each in zip(sources, found, strict=False)
        ]
        budget = needed_bytes(max(*trained, *built))
        plan = Plan((), tuple(range(blocks[0][0])), Policy.PAPER, budget)
        for each in found:
            previous = plan.stages[-1] if plan.stages else None
            stage = planner.stage(previous, each, raw_limit(budget, costs.calibration))
            plan = replace(plan, stages=(*plan.stages, stage))
        return plan

    def peak(self, plan: Plan, width: Fraction = _WHOLE) -> int:
        """What one client's task by this plan adds to the memory of a fresh trainer, measured."""

        def measured() -> int:
            model = self.whole if width == _WHOLE else self.network(width)
            # Noise is no file with rows; the network is the same, and takes what such files become.
            count = self.spec.input_shape[0]
            mean, std = self.spec.mean or (0.0,) * count, self.spec.std or (1.0,) * count
            spec = replace(self.spec, text=None, table=None, first_label=0, mean=mean, std=std)
            model = replace(model, spec=spec)
            self._say(f"measuring {plan.blocks}, {width} as wide")
            noise = write_noise(self.folder / "noise", model.spec, self.samples)
            run = self.folder / "trial"
            request = trial_request(model, plan, EVERYTHING, noise, run, enforce=False)
            try:
                end = asyncio.run(
                    # As little as the plan needs, and not what an allocator keeps beside it.
                    try_in_fresh_trainer(replace(request, release_freed=True), TrainerConfig(threads=1))
                )
            finally:
                shutil.rmtree(run, ignore_errors=True)
            if isinstance(end, Failed):
                raise ChildError(f"{plan.blocks} could not be tried: {end.message}")
            return max(stage.measured_peak_bytes for stage in end.result.stages)

        stages = msgspec.json.encode([(each.block, each.micro_batch, each.cache) for each in plan.stages]).decode()
        return int(self.remembered(f"peak of {stages}, {width} as wide", measured))

    def remembered(self, what: str, find: Callable[[], Any]) -> Any:
        """What `find` gave, now or when it was asked for first."""
        path = self.folder / "known.json"
        known = json.loads(path.read_bytes()) if path.exists() else {}
        if what not in known:
            known[what] = find()
            write_atomically(path, json.dumps(known, indent=1).encode() + b"\n")
        return known[what]

    def facts(self, plan: Plan, width: Fraction = _WHOLE) -> dict[str, Any]:
        """What is said of a plan."""
        return {
            "blocks": plan.blocks,
            "micro_batch": plan.stages[0].micro_batch,
            "width": float(width),
            "predicted_peak_bytes": plan.predicted_peak_bytes,
            "measured_peak_bytes": self.peak(plan, width),
        }

    def everyone(self, name: str, plan: Plan, width: Fraction = _WHOLE) -> Setup:
        """All clients train by this plan."""
        return Setup(name, [plan] * self.scale.clients, width, facts=self.facts(plan, width))
