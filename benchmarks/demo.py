"""The demo: a coordinator and six devices with unequal memory train a digit classifier and export it as ONNX.

    python -m benchmarks.demo --json FILE             what `make demo` runs
    python -m benchmarks.demo --compare --json FILE   three seeds, each also with full memory for every device

Every device is an agent process of its own with a hard limit for training; the tiers are so small that training the
whole model at the job's batch fails on the lower ones, which is shown before the rounds begin. The largest hold a
second model, which stays with them, and from which theirs distils; what one of them gains by that is shown at the end.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks.federation import Federation, Shard, run_federation
from benchmarks.full_training import fails_in_full
from benchmarks.gain import Gain, gain_of
from benchmarks.show import curve, device_table
from fedepth.data.idx import write_idx
from fedepth.data.partition import dirichlet
from fedepth.data.read import open_images
from fedepth.errors import FedepthError
from fedepth.plan import Policy
from fedepth.sizes import format_size
from fedepth.task import ModelSpec

MIB = 1 << 20
TIERS = {"small": 50 * MIB, "medium": 70 * MIB, "large": 100 * MIB}
DEVICES = ("small", "small", "medium", "medium", "large", "large")
SIZE = 40  # pixels; digits are 8×8 and are scaled up, so that tiers differ by tens of MiB
BATCH = 128
ROUNDS = 10
ALPHA = 0.3
LAST_ROUNDS = 5
MODELS = 2  # at most, on devices that have memory left
COMPARED_SEEDS = 3
EXPECTED = Path(__file__).parent / "results" / "demo.json"
SPEC = ModelSpec("digits-cnn", tuple("0123456789"), (1, SIZE, SIZE), (0.3,), (0.35,))

JOB = """\
[job]
name = "demo-digits"
rounds = {rounds}
devices_per_round = {devices}
quorum = {quorum}
round_deadline_s = 60
gather_s = 2
seed = {seed}
policy = "{policy}"

[model]
name = "{model}"
classes = 10
input_shape = [1, {size}, {size}]
mean = [0.3]
std = [0.35]

[training]
batch = {batch}
local_epochs = 3
optimizer = "adamw"
learning_rate = 0.004
schedule = "cosine"
weight_decay = 0.01
mutual = {mutual}

[test]
data = "digits"
"""

app = typer.Typer(add_completion=False)
console = Console(width=None if sys.stdout.isatty() else 130)


@dataclass(frozen=True)
class Outcome:
    """What one run of the demo came to."""

    seed: int
    accuracy: float
    seconds: float
    federation: Federation
    gain: Gain | None = None


def job_file(folder: Path, seed: int, policy: Policy, mutual: int = MODELS) -> Path:
    """Writes the demo's job file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.toml"
    path.write_text(
        JOB.format(
            rounds=ROUNDS,
            devices=len(DEVICES),
            quorum=len(DEVICES) - 1,
            seed=seed,
            policy=policy.value,
            model=SPEC.name,
            size=SIZE,
            batch=BATCH,
            mutual=mutual,
        )
    )
    return path


def write_shards(folder: Path, seed: int) -> list[Shard]:
    """Label-skewed shards of the digits' training images, one folder of IDX files per device."""
    digits = open_images("digits", SPEC, "train")
    shards: list[Shard] = []
    parts = dirichlet(digits.labels, clients=len(DEVICES), alpha=ALPHA, seed=seed, minimum=BATCH)
    for number, (tier, indices) in enumerate(zip(DEVICES, parts, strict=True), 1):
        name = f"{tier}-{number}"
        data = folder / "data" / name
        data.mkdir(parents=True, exist_ok=True)
        write_idx(data / "train-images-idx3-ubyte", np.ascontiguousarray(digits.read(indices)[:, 0]))
        write_idx(data / "train-labels-idx1-ubyte", digits.labels[indices].astype("uint8"))
        shards.append(Shard(name, tier, data, len(indices)))
    return shards


def run_once(folder: Path, seed: int, policy: Policy, *, full_memory: bool) -> Outcome:
    """One federation in a fresh folder."""
    shutil.rmtree(folder, ignore_errors=True)
    job = job_file(folder, seed, policy, 1 if full_memory else MODELS)  # the baseline is plain federated averaging
    caps = {tier: 0 if full_memory else cap for tier, cap in TIERS.items()}
    started = time.monotonic()
    shards = write_shards(folder, seed)
    federation = asyncio.run(run_federation(folder, job, shards, caps, console))
    last = federation.accuracies[-LAST_ROUNDS:]
    seconds = time.monotonic() - started
    richest = shards[-1]
    gain = None if full_memory else gain_of(folder / "coordinator", folder / richest.name, richest, job, ROUNDS)
    return Outcome(seed, sum(last) / len(last), seconds, federation, gain)


def expected() -> dict[str, Any]:
    """The last comparison with full memory that was recorded; empty if there is none."""
    recorded: dict[str, Any] = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    return recorded


def report(outcome: Outcome, failing: list[str], accuracy_full: float | None) -> dict[str, Any]:
    """The figures as `--json` writes them."""
    federation = outcome.federation
    return {
        "accuracy": outcome.accuracy,
        "accuracy_full_memory": accuracy_full,
        "rounds": len(federation.accuracies),
        "seconds": outcome.seconds,
        "devices": [asdict(device) for device in federation.devices],
        "onnx_path": federation.onnx_path,
        "parity_max_abs": federation.parity_max_abs,
        "idle_agent_rss_bytes": federation.idle_agent_rss_bytes,
        "full_training_fails_on": failing,
        "accuracies": federation.accuracies,
        "bytes_moved": federation.bytes_moved,
        "seed": outcome.seed,
        "mutual": asdict(outcome.gain) if outcome.gain else None,
    }


def expectation(pairs: Sequence[Mapping[str, Any]], seed: int) -> str:
    """What recorded pairs of runs, under limits and with full memory, let one expect of a run with this seed."""
    limited = [pair["accuracy"] for pair in pairs]
    full = [pair["accuracy_full_memory"] for pair in pairs]
    lines = [
        f"{pair['accuracy']:.1%} with seed {seed}; {pair['accuracy_full_memory']:.1%} with full memory for all"
        for pair in pairs
        if pair["seed"] == seed
    ]
    lines.append(
        f"{min(limited):.1%} to {max(limited):.1%} over {len(pairs)} seeds; {min(full):.1%} to {max(full):.1%} with "
        f"full memory, mean difference {(sum(limited) - sum(full)) / len(pairs):+.1%}"
    )
    return "\n           ".join(lines)


def show(outcome: Outcome, pairs: Sequence[Mapping[str, Any]]) -> None:
    """The closing tables, for people. `pairs`: recorded runs under limits and with full memory, none to say nothing."""
    federation = outcome.federation
    console.print(device_table(federation.devices))
    console.print(curve(federation.accuracies))
    console.print(
        f"accuracy {outcome.accuracy:.1%} (mean of the last {LAST_ROUNDS} rounds), "
        f"{outcome.seconds:.0f} s, {format_size(federation.bytes_moved)} moved"
    )
    if outcome.gain:
        gain = outcome.gain
        console.print(
            f"{gain.device} trains {gain.models} models: its last update alone comes to {gain.accuracy:.1%}, and to "
            f"{gain.accuracy_alone:.1%} without the other model; peak {format_size(gain.measured_peak_bytes)}, and "
            f"{format_size(gain.measured_peak_bytes_alone)} without"
        )
    if pairs:
        console.print(f"to expect: {expectation(pairs, outcome.seed)}")
    console.print(f"model: {federation.onnx_path}", markup=False)
    console.print(
        f"parity with torch on {federation.parity_samples} real test images: "
        f"largest difference {federation.parity_max_abs:.1e}, top-1 equal"
    )


@app.command()
def demo(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
    folder: Annotated[Path, typer.Option(help="Where state, logs and the model go.")] = Path("runs/demo"),
    policy: Annotated[
        Policy, typer.Option(help="paper splits in depth; auto takes smaller micro-batches.")
    ] = Policy.PAPER,
    seed: Annotated[int, typer.Option(help="Of the split, the initial weights and the training.")] = 1,
    compare: Annotated[bool, typer.Option(help="Three seeds, each also with full memory for all.")] = False,
) -> None:
    """Runs a federation of six devices with unequal memory, from nothing to an ONNX model."""
    folder = folder.resolve()
    console.print(f"[bold]fedepth demo[/bold]: {len(DEVICES)} devices, {ROUNDS} rounds, policy {policy.value}")
    try:
        figures = _figures(folder, seed, policy, compare=compare)
    except KeyboardInterrupt:
        console.print("stopped; every process is ended")
        raise typer.Exit(130) from None
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
        console.print(f"figures: {json_file}", markup=False)


def _figures(folder: Path, seed: int, policy: Policy, *, compare: bool) -> dict[str, Any]:
    failing = fails_in_full(folder / "full", SPEC, job_file(folder / "full", seed, policy), TIERS, console)
    if compare:
        return _compare(folder, seed, policy, failing)
    recorded = expected()
    outcome = run_once(folder / "run", seed, policy, full_memory=False)
    show(outcome, recorded.get("pairs", ()) if policy is Policy.PAPER else ())  # they were recorded with that
    return report(outcome, failing, recorded.get("accuracy_full_memory"))


def _compare(folder: Path, seed: int, policy: Policy, failing: list[str]) -> dict[str, Any]:
    """Three seeds, each under the tiers' limits and with full memory; same split, same initial weights."""
    figures: dict[str, Any] = {}
    pairs: list[dict[str, float]] = []
    for number in range(seed, seed + COMPARED_SEEDS):
        limited = run_once(folder / "run", number, policy, full_memory=False)
        show(limited, ())
        figures = figures or report(limited, failing, None)
        full = run_once(folder / "full-memory", number, policy, full_memory=True)
        pairs.append({"seed": number, "accuracy": limited.accuracy, "accuracy_full_memory": full.accuracy})
        console.print(f"seed {number}: {limited.accuracy:.1%} under limits, {full.accuracy:.1%} with full memory")
    mean = {key: sum(pair[key] for pair in pairs) / len(pairs) for key in ("accuracy", "accuracy_full_memory")}
    difference = mean["accuracy"] - mean["accuracy_full_memory"]
    console.print(f"paired difference over {len(pairs)} seeds: {difference:+.2%}")
    return {**figures, **mean, "paired_difference": difference, "pairs": pairs}


if __name__ == "__main__":
    try:
        sys.exit(app(standalone_mode=False))
    except FedepthError as error:
        console.print(str(error), style="red", markup=False)
        sys.exit(1)
