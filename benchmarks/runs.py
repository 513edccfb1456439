"""Runs of `fedepth simulate` for benchmarks: their data and job files, and the figures that come of them."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fedepth.data.idx import IdxFile, write_idx
from fedepth.files import write_atomically
from fedepth.simulation.compare import Comparison
from fedepth.sizes import format_size

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
        images: of the training images, or rows; 0 for all of scikit-learn's digits instead.
        mean, std: of every channel.
        rows: lines of a job that stand for these and the shape where the data are rows, from the classes on.
        training: further lines of its section [training].
    """

    model: str
    input_shape: tuple[int, int, int]
    images: int
    clients: int
    drawn: int
    rounds: int
    epochs: int
    batch: int
    rate: float
    seeds: tuple[int, ...]
    mean: float = 0.29
    std: float = 0.33
    rows: str = ""
    training: str = ""


JOB = """\
[job]
name = "{name}"
rounds = {rounds}
devices_per_round = {drawn}
seed = {seed}
policy = "{policy}"

[model]
name = "{model}"
{inputs}
[training]
batch = {batch}
local_epochs = {epochs}
learning_rate = {rate}
learning_rate_end = {rate_end}
{training}

[test]
data = {data}
"""

IMAGES = """\
classes = 10
input_shape = {shape}
mean = {mean}
std = {std}
"""


def fashion(images: int, folder: Path) -> Path:
    """The first so many training images and all test images, as IDX files."""
    if not FASHION.is_dir():
        raise SystemExit(f"{FASHION} is missing: apt install dataset-fashion-mnist")
    folder.mkdir(parents=True, exist_ok=True)
    for split, most in (("train", images), ("t10k", None)):
        for kind in ("images-idx3", "labels-idx1"):
            found = next(FASHION.glob(f"{split}-{kind}-ubyte*"))
            file = IdxFile(found, None, folder)
            count = file.shape[0] if most is None else most
            items = np.frombuffer(file.read_items(range(count)), np.uint8)
            write_idx(folder / f"{split}-{kind}-ubyte", items.reshape(count, *file.shape[1:]))
    return folder


def job_text(
    scale: Scale, *, name: str, seed: int, data: str, training: str, policy: str = "paper", rate_end: float = 0.0
) -> str:
    """A job file.

    Args:
        training: further lines of its section [training].
        rate_end: the learning rate of the last round, to which it falls.
    """
    training = f"{training}\n{scale.training}" if scale.training else training
    shape, channels = list(scale.input_shape), scale.input_shape[0]
    images = IMAGES.format(shape=shape, mean=[scale.mean] * channels, std=[scale.std] * channels)
    return JOB.format(
        name=name, rounds=scale.rounds, drawn=scale.drawn, seed=seed, policy=policy, model=scale.model,
        inputs=scale.rows or images, batch=scale.batch, epochs=scale.epochs, rate=scale.rate,
        rate_end=rate_end, training=training, data=json.dumps(data),
    )  # fmt: skip


def simulate(job: Path, text: str, data: str, output: Path, *options: str, module: str = "fedepth.cli") -> Path:
    """One run of this job file, or what is missing of it. Returns `output`, beside which the processor time is kept.

    Args:
        module: the `fedepth` that is run.
    """
    job.parent.mkdir(parents=True, exist_ok=True)
    job.write_text(text)
    command = [
        sys.executable, "-m", module, "simulate", str(job), "--data", data, "--output", str(output), *options,
    ]  # fmt: skip
    before, began = processor_seconds(output), _children_seconds()
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    finally:
        seconds = before + _children_seconds() - began
        write_atomically(_clock(output), json.dumps(round(seconds, 1)).encode() + b"\n")
    return output


def processor_seconds(output: Path) -> float:
    """What a run has taken so far in all of its processes: other programs on the machine do not count."""
    clock = _clock(output)
    return float(json.loads(clock.read_bytes())) if clock.exists() else 0.0


def _clock(output: Path) -> Path:
    return output.with_name(f"{output.name}.seconds")


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def figures(found: Comparison) -> dict[str, Any]:
    """The figures of runs with one name, under the names that the documentation uses."""
    return {
        "accuracy_mean": None if found.final is None else found.final.mean,
        "accuracy_std": None if found.final is None else found.final.std,
        "best_accuracy_mean": None if found.best is None else found.best.mean,
        "best_accuracy_std": None if found.best is None else found.best.std,
        "seeds": len(found.seeds),
        "rounds": found.rounds,
        "measured_peak_bytes_by_tier": found.peaks,
        "gradient_steps": found.steps,
        "samples": found.samples_seen,
        "seconds": found.seconds,
        "bytes_down": found.bytes_down,
        "bytes_up": found.bytes_up,
    }


def table(found: Sequence[Comparison]) -> Table:
    """For people."""
    shown = Table(title="accuracy after the last round, mean and standard deviation over seeds")
    for column in ("method", "accuracy", "steps", "samples", "seconds", "up", "peak by tier"):
        shown.add_column(column, justify="left" if column in ("method", "peak by tier") else "right")
    for each in found:
        accuracy = "" if each.final is None else f"{each.final.mean:.1%} ± {each.final.std:.1%}"
        peaks = ", ".join(f"{tier}: {format_size(peak)}" for tier, peak in each.peaks.items())
        numbers = (f"{each.steps:.0f}", f"{each.samples_seen:.0f}", f"{each.seconds:.0f}")
        shown.add_row(each.name, accuracy, *numbers, format_size(round(each.bytes_up)), peaks)
    return shown
