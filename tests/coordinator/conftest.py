"""A small job without torch: three units, fake weights, and a stand-in for the model worker."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator import admission, closing, course
from coordinator.global_model import prepare
from coordinator.job import Job
from coordinator.store.records import Store, TaskRecord
from fedepth.aggregation import norms
from fedepth.aggregation.combine import Combined
from fedepth.aggregation.rules import Norms
from fedepth.budget import Budget
from fedepth.costs import ModelCosts, PassCost, Size, StepCost, UnitCost
from fedepth.errors import ChildError
from fedepth.job import model_spec
from fedepth.job_sections import JobConfig
from fedepth.layout import ModelLayout, TensorInfo, UnitLayout
from fedepth.plan import CachePlace, PeakComponents, Plan, Policy, Stage
from fedepth.task import DeviceReport, PartInfo, Result, StageResult
from tests.coordinator.loop_guard import watching

UNITS = 3
MIB = 1 << 20


def cost(name: str) -> UnitCost:
    return UnitCost(
        name=name,
        parameter_bytes=4000,
        buffer_bytes=0,
        largest_parameter_bytes=4000,
        input_bytes=256,
        output_bytes=256,
        training=StepCost(Size(0, 256), True, False, PassCost(Size(0, 256)), PassCost(Size(0, 512))),
        backward_first=PassCost(Size(0, 512)),
        inference=PassCost(Size(0, 256)),
        flops=1000,
    )


COSTS = ModelCosts(
    model="fake",
    units=tuple(replace(cost(f"unit{index}"), exit=cost(f"exit{index}")) for index in range(UNITS)),
    input_bytes=256,
    raw_input_bytes=64,
    smallest_micro_batch=1,
)
GRAPH = msgspec.json.encode({"graph": None, "costs": COSTS})  # the server process reads the costs only
LAYOUT = ModelLayout(
    units=tuple(
        UnitLayout(f"unit{index}", (TensorInfo(f"unit{index}.weight", (1000,), "F32"),)) for index in range(UNITS)
    ),
    head=(TensorInfo("head.weight", (10, 10), "F32"),),
)


def plan_of(*ranges: tuple[int, int], untrained: tuple[int, ...] = ()) -> Plan:
    peak = PeakComponents(1000, 1000, 1000, 1000, 0, 0, 0)
    stages = tuple(Stage(first, last, 8, CachePlace.RAM, 8, peak) for first, last in ranges)
    return Plan(stages, untrained, Policy.AUTO, 10_000)


def config_of(**job: Any) -> JobConfig:
    """A job with these [job] settings; those that are sections stand beside it."""
    others = {key: value for key, value in job.items() if isinstance(value, dict) or key == "test"}
    settings = {key: value for key, value in job.items() if key not in others}
    section = {"name": "demo", "rounds": 1, "devices_per_round": 2, "gather_s": 0, "lease_s": 30, **settings}
    return msgspec.convert(
        {
            "test": {"data": "digits"},
            **others,
            "job": section,
            "model": {"name": "fake", "classes": 2, "input_shape": [1, 8, 8]},
            "training": {"batch": 8, **others.get("training", {})},
        },
        JobConfig,
    )


def report_of(device_id: str, budget_bytes: int = 100 * MIB, classes: int = 2) -> DeviceReport:
    return DeviceReport(
        device_id=device_id,
        name=f"board {device_id}",
        budget=Budget(budget_bytes, budget_bytes, (), 0, 0, 1.0, 0, budget_bytes),
        sample_count=classes * 10,
        class_counts=(10,) * classes,
    )


def task_record(task_id: str = "t-0001-0000", device_id: str = "a", attempt: int = 1) -> TaskRecord:
    return TaskRecord(task_id, 1, device_id, attempt, "given", plan_of((0, 1), (2, 2)), 20)


def result_for(task: TaskRecord, parts: dict[int, bytes], **changes: Any) -> Result:
    plan: Plan = changes.get("plan", task.plan)
    stages = tuple(
        StageResult(each.first, each.last, 8, 4000, 3950, 3900, 3800, 10_000, 2.0, 1.0, 3, 20, 0.5)
        for each in plan.stages
    )
    trained = tuple(unit for each in plan.stages for unit in range(each.first, each.last + 1))
    fields: dict[str, Any] = {
        "task_id": task.task_id,
        "attempt": task.attempt,
        "device_id": task.device_id,
        "round": task.round,
        "sample_count": 20,
        "plan": plan,
        "trained_units": trained,
        "stages": stages,
        "parts": tuple(PartInfo(part, len(data), sha256(data)) for part, data in parts.items()),
        "seconds": 1.0,
        "allocator": "none",
        "baseline_bytes": 0,
    }
    return Result(**{**fields, **changes})


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fake_combine(
    rule: Any, training: Any, base: Path, results: list[Result], paths: Any, output: Path, **_: Any
) -> Combined:
    """Writes down what it was given, in its order."""
    parts = [b"+".join(path.read_bytes() for path in paths(result)) for result in results]
    data = b"|".join([base.read_bytes(), *parts])
    output.write_bytes(data)
    return Combined(sha256(data), ())


@dataclass
class FakeModels:
    """Answers what the model worker would, and remembers what it was asked.

    `losses` are those of evaluations, one after the other; the last repeats. None is what is no number.
    """

    losses: list[float | None] = field(default_factory=lambda: [0.5])
    accuracies: list[float] = field(default_factory=lambda: [0.75])
    dead: bool = False
    asked: list[str] = field(default_factory=list)
    stopped: bool = False

    async def request(self, do: str, **fields: Any) -> dict[str, Any]:
        self.asked.append(do)
        if do == "prepare":
            Path(fields["output"]).write_bytes(b"initial weights")
            Path(fields["graph"]).write_bytes(GRAPH)
            return {
                "layout": msgspec.to_builtins(LAYOUT),
                "notes": (),
                "digest": sha256(b"initial weights"),
                "size_bytes": 15,
                "graph_digest": sha256(GRAPH),
                "graph_bytes": len(GRAPH),
            }
        if do == "evaluate":
            if self.dead:
                raise ChildError("the model worker ended with status -9")
            loss, accuracy = (each[0] if len(each) == 1 else each.pop(0) for each in (self.losses, self.accuracies))
            return {"accuracy": accuracy, "loss": loss, "samples": 100}
        Path(fields["output"]).write_bytes(b"onnx")
        return {
            "path": fields["output"],
            "parity_max_abs": 1e-7,
            "samples": 100,
            "compared_on": "100 samples of the test data",
            "top1_equal": True,
            "ties": 0,
            "size_bytes": 4,
        }

    async def stop(self) -> None:
        self.stopped = True


@dataclass(frozen=True)
class Kit:
    """The builders above, for test modules that cannot import this one."""

    layout: ModelLayout = LAYOUT
    costs: ModelCosts = COSTS
    graph: bytes = GRAPH
    plan: Callable[..., Plan] = plan_of
    config: Callable[..., JobConfig] = config_of
    report: Callable[..., DeviceReport] = report_of
    task: Callable[..., TaskRecord] = task_record
    result: Callable[..., Result] = result_for
    models: Callable[[], FakeModels] = FakeModels
    combine: Callable[..., list[str]] = fake_combine
    sha256: Callable[[bytes], str] = sha256


@pytest.fixture
def kit() -> Kit:
    return Kit()


class Running:
    """A job that runs by itself, with a stand-in for its model."""

    def __init__(self, job: Job, models: Any, task: asyncio.Task[None]) -> None:
        self.job = job
        self.models = models
        self.task = task


@pytest.fixture
def run_job(tmp_path: Path, kit: Kit, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a job with these [job] settings within an `async with` block; keeps its state for the next one.

    Updates of any bytes are admitted, and their average is what `fake_combine` makes of them.
    """
    monkeypatch.setattr(admission, "check_update", lambda paths, layout, result: None)
    monkeypatch.setattr(norms, "update_norms", lambda *_: Norms(0.0, 0.0))
    monkeypatch.setattr(closing, "combine", fake_combine)
    monkeypatch.setattr(course, "TICK_S", 0.01)

    @asynccontextmanager
    async def running(models: Any = None, **section: Any) -> AsyncIterator[Running]:
        config = kit.config(**section)
        store = await asyncio.to_thread(Store.open, tmp_path, config.job.name, model_spec(config))
        models = models or kit.models()
        job = await asyncio.to_thread(Job, config, store, models, await prepare(config, store, models))
        task = asyncio.create_task(job.run())
        try:
            yield Running(job, models, task)
        finally:
            task.cancel()
            await asyncio.wait({task})
            await job.finish_work()
            job.plans.close()
            store.close()

    return running


@pytest.fixture(autouse=True)
def _loop_never_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No coroutine of ours touches files or databases in the loop, in any test here."""
    with watching(monkeypatch) as found:
        yield
    assert found == []
