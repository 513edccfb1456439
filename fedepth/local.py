"""One task in this process, without a coordinator: for notebooks, trials, and code that uses fedepth as a library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fedepth.aggregation.updates import ClientUpdate
from fedepth.costs import Calibration
from fedepth.data.read import DIGITS, Images, open_images
from fedepth.files import disk_errors, file_digest
from fedepth.job import check_training
from fedepth.models.traced import write_traced
from fedepth.plan import Plan
from fedepth.prepare import PreparedModel
from fedepth.task import ModelSpec, Result, Task, TrainingSpec
from fedepth.training.session import Assignment, Granted, Known, run
from fedepth.weights import save

NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class LocalUpdate:
    """What came of a task.

    Attributes:
        result: what each stage needed and did.
        update: for `aggregate`; its weight is the number of samples.
    """

    result: Result
    update: ClientUpdate


def save_prepared(prepared: PreparedModel, folder: Path) -> tuple[Path, Path]:
    """Writes a prepared model's graph and its first weights. Returns the paths of both.

    Raises:
        DiskError: the folder cannot be written.
    """
    graph, weights = folder / "graph.json", folder / "weights.safetensors"
    with disk_errors("the model cannot be saved", folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_traced(graph, prepared.traced)
        save(weights, {name: tensor.detach().numpy() for name, tensor in prepared.tensors.items()})
    return graph, weights


def train_task(
    graph: Path,
    weights: Path,
    data: Path | str | Images,
    spec: ModelSpec,
    training: TrainingSpec,
    plan: Plan,
    output: Path,
    *,
    round: int = 1,
    device_id: str = "client",
    budget_bytes: int = NO_LIMIT,
    enforce: bool = False,
    calibration: Calibration = Calibration(),
) -> LocalUpdate:
    """Trains a plan as a device does, from its warm-up to the parts of its update.

    Args:
        graph: a file of `save_prepared`.
        weights: the global weights.
        data: a folder as a device may have it, "digits", or samples that are open.
        output: where the parts go; below it, what is cached on disk.
        round: shuffles differ from round to round.
        device_id: and from device to device.
        budget_bytes: bytes that training may add to this process. A plan that needs more is replaced by a smaller one.
        enforce: try every stage before it is trained, and hold it to the budget with RLIMIT_DATA.
        calibration: of this device.

    Raises:
        ConfigError: `training` holds what no job file may.
        FedepthError: see `fedepth.training.session.run`. After an OverBudgetError go on in another process.
    """
    check_training(training)
    # Folders are left to the session, which opens them as on a device: with the tokenizer that comes with the graph.
    folder: Path | None = None
    opened: Images | None = None
    if data == DIGITS:
        opened = open_images(DIGITS, spec, "train")
    elif isinstance(data, Path | str):
        folder = Path(data)
    else:
        opened = data
    digest = file_digest(weights)
    task = Task(f"local-{round}", 1, "local", round, spec, training, plan.policy, plan, "", 0, digest, 0, "")
    assignment = Assignment(
        task=task,
        plan=plan,
        graph=graph,
        calibration=calibration,
        weights=weights,
        data=folder or output,
        output=output,
        cache=output / "cache",
        device_id=device_id,
        enforce=enforce,
        images=opened,
        rehearse=enforce,
    )
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    result = run(assignment, Granted(budget_bytes), device, Known())
    parts = tuple(output / part.file_name for part in result.parts)
    digests = tuple(part.digest for part in result.parts)
    return LocalUpdate(result, ClientUpdate(parts, float(result.sample_count), digests, result.steps(training)))
