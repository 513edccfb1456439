"""How long the planner takes, and how many devices a coordinator answers.

    python -m benchmarks.planner --json FILE

Plans for models of 30 and of 100 units, made up from a fixed seed, are made for budgets from less than anything needs
to more than everything needs, each from nothing. Of three tries at a budget the fastest counts, since others use this
processor as well; of all budgets the slowest. Then a coordinator in this process, on the
loopback interface, is polled by many devices of different budgets; they share its processor.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import msgspec
import structlog
import typer
from fedepth_wire.channel import SERVER_OPTIONS, open_channel
from fedepth_wire.convert import to_message
from fedepth_wire.tls import INSECURE
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationStub, add_FederationServicer_to_server
from rich.console import Console
from rich.table import Table

from coordinator.global_model import prepare
from coordinator.job import Job
from coordinator.service import FederationService
from coordinator.store.records import Store
from fedepth.budget import Budget
from fedepth.costs import Convolution, ModelCosts, PassCost, Size, StepCost, UnitCost
from fedepth.errors import PlanError
from fedepth.files import file_digest
from fedepth.job import model_spec
from fedepth.job_sections import JobConfig
from fedepth.layout import ModelLayout, TensorInfo, UnitLayout
from fedepth.plan import Policy
from fedepth.planning.planner import full_training_peak, make_plan, smallest_peak
from fedepth.sizes import format_size
from fedepth.task import DeviceReport, TrainingSpec

SAMPLES = 5000
BUDGETS = 24
TRIES = 3
DEVICES = 500
POLLING_S = 10.0
TRAINING = TrainingSpec(128, 5, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)
_MAP_BYTES = 100_000  # what goes from unit to unit, per sample
_SEED = 1

app = typer.Typer(add_completion=False)
console = Console(width=None if sys.stdout.isatty() else 130)


@dataclass(frozen=True)
class Timing:
    """One plan: for which budget, in how many stages (0 where nothing fits), CPU-seconds."""

    budget_bytes: int
    stages: int
    untrained: int
    seconds: float


def made_up_model(units: int) -> ModelCosts:
    """A convolutional network of so many units, no two alike; every unit has an exit and can be trained through."""
    drawn = random.Random(_SEED)
    head = _unit(drawn, "head", 40_000, 2_000, None)
    return ModelCosts(
        "made-up",
        tuple(
            _unit(drawn, f"u{index}", drawn.randrange(100_000, 4_000_000), _MAP_BYTES, head) for index in range(units)
        ),
        input_bytes=12_288,
        raw_input_bytes=3_072,
        smallest_micro_batch=1,
    )


def _unit(drawn: random.Random, name: str, parameter_bytes: int, map_bytes: int, exit_: UnitCost | None) -> UnitCost:
    def one_pass() -> PassCost:
        peak, *living = (Size(0, drawn.randrange(2 * map_bytes)) for _ in range(3))
        return PassCost(
            peak, tuple(Convolution(drawn.randrange(parameter_bytes), 0, Size(0, 0), each) for each in living)
        )

    def step() -> StepCost:
        saved = Size(0, drawn.randrange(map_bytes, 4 * map_bytes))
        return StepCost(saved, drawn.random() < 0.7, drawn.random() < 0.3, one_pass(), one_pass())

    return UnitCost(
        name=name,
        parameter_bytes=parameter_bytes,
        buffer_bytes=1_000,
        largest_parameter_bytes=parameter_bytes // 2,
        input_bytes=_MAP_BYTES,
        output_bytes=_MAP_BYTES if exit_ else 0,
        training=step(),
        backward_first=one_pass(),
        inference=one_pass(),
        flops=drawn.randrange(10**6, 10**8),
        frozen=step() if exit_ else None,
        exit=exit_,
    )


def time_plans(units: int) -> list[Timing]:
    """Plans for a ladder of budgets."""
    costs = made_up_model(units)
    least = smallest_peak(costs, TRAINING, SAMPLES, Policy.AUTO)
    most = 1.3 * full_training_peak(costs, TRAINING, SAMPLES).total
    ladder = [least // 2, *(int(least * (most / least) ** (step / (BUDGETS - 1))) for step in range(BUDGETS))]
    return [min((_time_plan(costs, budget) for _ in range(TRIES)), key=lambda each: each.seconds) for budget in ladder]


def _time_plan(costs: ModelCosts, budget_bytes: int) -> Timing:
    started = time.process_time()
    try:
        plan = make_plan(costs, budget_bytes=budget_bytes, training=TRAINING, sample_count=SAMPLES, policy=Policy.AUTO)
    except PlanError:
        return Timing(budget_bytes, 0, len(costs.units), time.process_time() - started)
    seconds = time.process_time() - started
    return Timing(budget_bytes, len(plan.stages), len(plan.untrained), seconds)


class _NoModels:
    """In place of the model worker: costs that are made up, and weights that nobody reads."""

    async def request(self, do: str, **fields: Any) -> dict[str, Any]:
        output = Path(fields["output"])
        output.write_bytes(b"no weights")
        costs = made_up_model(30)
        layout = ModelLayout(
            tuple(UnitLayout(unit.name, ()) for unit in costs.units), (TensorInfo("head", (1,), "F32"),)
        )
        graph = Path(fields["graph"])
        graph.write_bytes(msgspec.json.encode({"costs": costs}))
        return {
            "layout": msgspec.to_builtins(layout),
            "notes": [],
            "digest": file_digest(output),
            "size_bytes": output.stat().st_size,
            "graph_digest": file_digest(graph),
            "graph_bytes": graph.stat().st_size,
        }

    async def stop(self) -> None: ...


def _reports(count: int) -> list[DeviceReport]:
    """Devices of about 50 MiB to 1 GiB."""
    drawn = random.Random(_SEED)
    budgets = [int((50 << 20) * 20 ** drawn.random()) for _ in range(count)]
    return [
        DeviceReport(f"d{index}", f"board {index}", Budget(each, each, (), 0, 0, 1.0, 0, each), SAMPLES, (SAMPLES,))
        for index, each in enumerate(budgets)
    ]


async def poll(folder: Path, devices: int, seconds: float) -> dict[str, float]:
    """The seconds until every device has been answered once, and polls per second from then on.

    The round never fills, so that every answer is "come back": decoding, the record of the device, its plan, a place in
    the line, and out of it again.
    """
    section = {"name": "polls", "rounds": 1, "devices_per_round": 2 * devices, "gather_s": 3600, "lease_s": 3600}
    model = {"name": "made-up", "classes": 2, "input_shape": [3, 32, 32]}
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    config = msgspec.convert(
        {"job": section, "model": model, "test": {"data": "digits"}, "training": {"batch": TRAINING.batch}}, JobConfig
    )
    store = Store.open(folder, config.job.name, model_spec(config))
    job = Job(config, store, _NoModels(), await prepare(config, store, _NoModels()))
    server = grpc.aio.server(options=SERVER_OPTIONS)
    add_FederationServicer_to_server(FederationService(job), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    running = asyncio.ensure_future(job.run())
    requests = [
        pb.NextTaskRequest(device=to_message(report, pb.DeviceReport), wait_ms=0) for report in _reports(devices)
    ]
    try:
        async with open_channel(f"127.0.0.1:{port}", INSECURE) as channel:
            ask = FederationStub(channel).NextTask
            started = time.monotonic()
            await asyncio.gather(*(_answered(ask, request) for request in requests))
            first_seconds = time.monotonic() - started
            end = time.monotonic() + seconds
            counts = await asyncio.gather(*(_keep_polling(ask, request, end) for request in requests))
            elapsed = time.monotonic() - end + seconds
    finally:
        running.cancel()
        await asyncio.wait({running})
        job.events.close()
        await server.stop(0)
        job.plans.close()
        store.close()
    return {"devices": devices, "first_polls_seconds": first_seconds, "polls_per_second": sum(counts) / elapsed}


Ask = Callable[[pb.NextTaskRequest], Awaitable[pb.NextTaskReply]]


async def _answered(ask: Ask, request: pb.NextTaskRequest) -> None:
    outcome = (await ask(request)).WhichOneof("outcome")
    if outcome != "retry":
        raise RuntimeError(f"a device was answered {outcome}, and this benchmark's round should never fill")


async def _keep_polling(ask: Ask, request: pb.NextTaskRequest, end: float) -> int:
    count = 0
    while time.monotonic() < end:
        await _answered(ask, request)
        count += 1
    return count


@app.command()
def planner(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
    devices: Annotated[int, typer.Option(help="Devices that poll.")] = DEVICES,
    seconds: Annotated[float, typer.Option(help="For how long they poll.")] = POLLING_S,
) -> None:
    """Times the planner, and a coordinator that many devices poll."""
    timings = {units: time_plans(units) for units in (100, 30)}
    with tempfile.TemporaryDirectory(prefix="fedepth-polls-") as folder:
        polls = asyncio.run(poll(Path(folder), devices, seconds))
    for units, rows in timings.items():
        table = Table("budget", "stages", "untrained", "CPU ms", title=f"plans for {units} units")
        for row in rows:
            stages = str(row.stages) if row.stages else "nothing fits"
            table.add_row(format_size(row.budget_bytes), stages, str(row.untrained), f"{1000 * row.seconds:.1f}")
        console.print(table)
    console.print(
        f"{devices} devices: all answered once after {polls['first_polls_seconds']:.2f} s, then "
        f"{polls['polls_per_second']:.0f} polls a second"
    )
    figures = {
        "seconds_100_units": max(row.seconds for row in timings[100]),
        "seconds_30_units": max(row.seconds for row in timings[30]),
        **polls,
        "plans": {units: [msgspec.to_builtins(row) for row in rows] for units, rows in timings.items()},
    }
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    app()
