"""Tasks and results with sizes that can be followed by hand, and the agent's surroundings."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_client.data_check.protocol import CheckRequest, RowRequest
from fedepth.costs import ModelCosts, Size, UnitCost
from fedepth.data.check import check_data
from fedepth.data.damage import Damage, RowCheck
from fedepth.data.rows import check_rows
from fedepth.plan import Plan, Policy
from fedepth.planning.planner import make_plan
from fedepth.task import ModelSpec, PartInfo, Result, StageResult, Task, TrainingSpec
from tests.unit_costs import unit_cost

MIB = 1 << 20
WEIGHTS = b"weights" * 1000
SAMPLES = 6  # what `data` holds
# A PNG of one gray pixel.
PICTURE = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c636800000082008177cd72b6"
    "0000000049454e44ae426082"
)


async def checked_here(request: CheckRequest, on_progress: Callable[[int], None]) -> Damage:
    """A check of data files as the agent's child does it, without the child."""
    return check_data(Path(request.directory), Path(request.record), decode=request.decode, on_progress=on_progress)


async def rows_checked_here(request: RowRequest, on_progress: Callable[[int], None]) -> RowCheck:
    """The same of rows."""
    return check_rows(Path(request.source), Path(request.record), request.model, on_progress=on_progress)


def unit(name: str) -> UnitCost:
    """1 MiB of parameters and 1 MiB of saved activations per sample."""
    exit_ = unit_cost("exit", parameter_bytes=40, input_bytes=1000, output_bytes=8, saves_output=True)
    return unit_cost(
        name,
        parameter_bytes=MIB,
        input_bytes=1000,
        output_bytes=1000,
        saved=Size(0, MIB),
        saves_output=True,
        exit_=exit_,
    )


COSTS = ModelCosts("toy", tuple(unit(f"u{i}") for i in range(8)), 1000, 250, 1)
GRAPH = msgspec.json.encode({"graph": None, "costs": COSTS})  # an agent reads the costs only
TRAINING = TrainingSpec(4, 1, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 0)


@pytest.fixture
def plan_for() -> Callable[[int], Plan]:
    """The plan that the planner makes of a budget."""

    def plan(budget_bytes: int) -> Plan:
        return make_plan(COSTS, budget_bytes=budget_bytes, training=TRAINING, sample_count=SAMPLES, policy=Policy.PAPER)

    return plan


@pytest.fixture
def make_task(plan_for: Callable[[int], Plan]) -> Callable[..., Task]:
    def task(task_id: str = "t1", model: str = "toy", budget_bytes: int = 200 * MIB) -> Task:
        return Task(
            task_id=task_id,
            attempt=1,
            job="job",
            round=3,
            model=ModelSpec(model, ("a", "b"), (1, 8, 8), (0.5,), (0.5,)),
            training=TRAINING,
            policy=Policy.PAPER,
            plan=plan_for(budget_bytes),
            graph_digest=hashlib.sha256(GRAPH).hexdigest(),
            graph_bytes=len(GRAPH),
            weights_digest=hashlib.sha256(WEIGHTS).hexdigest(),
            weights_bytes=len(WEIGHTS),
            run_id="run",
        )

    return task


@pytest.fixture
def make_result(plan_for: Callable[[int], Plan], tmp_path: Path) -> Callable[..., tuple[Result, Path]]:
    """A result and the folder with its parts."""

    def result(task_id: str, *parts: bytes) -> tuple[Result, Path]:
        folder = tmp_path / f"output-{task_id}"
        folder.mkdir()
        for number, content in enumerate(parts):
            (folder / f"part-{number:04d}.safetensors").write_bytes(content)
        infos = tuple(PartInfo(n, len(c), hashlib.sha256(c).hexdigest()) for n, c in enumerate(parts))
        stage = StageResult(0, 3, 4, 10, 9, 9, 8, 200 * MIB, 2.0, 1.0, 2, 6, 0.5)
        trained = plan_for(200 * MIB)
        return Result(task_id, 1, "device", 3, 6, trained, (0, 1, 2, 3), (stage,), infos, 1.5, "fake 1", 5), folder

    return result


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six images in two classes."""
    folder = tmp_path / "data"
    for name, count in (("a", 4), ("b", 2)):
        (folder / "train" / name).mkdir(parents=True)
        for number in range(count):
            (folder / "train" / name / f"{number}.png").write_bytes(PICTURE)
    return folder


@pytest.fixture
def bench(tmp_path: Path, data: Path) -> Any:
    from tests.edge_client.bench import Bench  # which needs this module

    return Bench(tmp_path, data)


@pytest.fixture
def transport(tmp_path: Path) -> Any:
    from tests.edge_client.bench import FakeTransport

    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"weights")
    return FakeTransport(weights, [])
