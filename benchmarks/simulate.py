"""Whether a simulation is the real thing, and what it costs.

python -m benchmarks.simulate --json FILE          a quarter of an hour on two cores
python -m benchmarks.simulate --quick --json FILE  fewer rounds and clients

equal_to_processes      the job run by a coordinator and three agents, two of which split the model, gives the same
                        global weights, bit for bit, with plans pinned
equal_across_workers    so do 1, 2 and 3 workers
equal_on_ray            so does Ray; null where it is not installed
equal_after_kill        so does a run that was killed (-9) at random moments until it was through
images_per_second_ratio images that workers train per second of processor time, by those of as many plain training
                        loops over the same images, side by side, before and after: two cores may be one with two
                        threads, and other programs on the machine should not count
busy_fraction           share of the time from the first to the last round in which workers worked on requests
rss_bytes_*_clients     peak resident memory of all processes together, for 100 and 1,000 clients on one data set
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
from rich.console import Console

from benchmarks.lab import LabDevice, lab, program, status_bytes
from benchmarks.plain_training import Plain
from fedepth.child import module_argv
from fedepth.data.idx import write_idx
from fedepth.data.read import open_images
from fedepth.files import file_digest
from fedepth.job import load_config, model_spec, training_spec
from fedepth.memory.environment import environment
from fedepth.simulation.engine import LocalEngine
from fedepth.simulation.progress import Reporter
from fedepth.simulation.record import Record
from fedepth.simulation.run import Run
from fedepth.simulation.setup import Options, set_up
from fedepth.terminal import console as quiet_console

MIB = 1 << 20
SHARE = 96
CAPS = (11 * MIB, 64 * MIB, 14 * MIB)  # two of them have to split the model
SEED = 5
_LIMIT_S = 3600

JOB = """\
[job]
name = "{name}"
rounds = {rounds}
devices_per_round = {devices}
quorum = {devices}
gather_s = 0.2
lease_s = 60
seed = 3
policy = "paper"

[model]
name = "{model}"
classes = 10
input_shape = [1, {side}, {side}]
mean = [0.3]
std = [0.35]

[training]
batch = 32
local_epochs = {epochs}
learning_rate = 0.05
augmentation = "{augmentation}"

[test]
data = "{test}"
"""


def job_file(folder: Path, name: str, **changes: Any) -> Path:
    """A job on the digits, or on what `test` names."""
    fields = {
        "rounds": 2, "devices": 3, "model": "digits-cnn", "side": 32, "epochs": 2, "augmentation": "none",
        "test": "digits",
    }  # fmt: skip
    path = folder / f"{name}.toml"
    path.write_text(JOB.format(name=name, **{**fields, **changes}))
    return path


def device_id(number: int) -> str:
    """Of a device of this benchmark."""
    return f"00000000-0000-4000-8000-{number:012d}"


def on_devices(folder: Path, job: Path) -> tuple[Path, dict[str, Any]]:
    """The final weights of a job on real processes, and the plans of its devices."""
    digits = open_images("digits", model_spec(load_config(job)), "train")
    with lab(folder / "devices") as running:
        running.start_coordinator(job, "--exit-when-done")
        for number, cap in enumerate(CAPS):
            name = f"device-{number}"
            state, data = running.folder / name, running.folder / f"data-{number}"
            for each in (state, data):
                each.mkdir(parents=True)
            (state / "device-id").write_text(f"{device_id(number)}\n")
            chosen = np.arange(number * SHARE, (number + 1) * SHARE)
            write_idx(data / "train-images-idx3-ubyte", np.ascontiguousarray(digits.read(chosen)[:, 0]))
            write_idx(data / "train-labels-idx1-ubyte", digits.labels[chosen].astype(np.uint8))
            running.start_agent(LabDevice(name, data, cap), "--threads", "1", "--exit-when-done")
        if running.processes["coordinator"].wait(_LIMIT_S):
            raise SystemExit(f"the coordinator failed; see {running.log('coordinator')}")
        argv = [program("fedepth-coordinator"), "record", "--state", str(running.coordinator_state), "--json"]
        record = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
        last = load_config(job).job.rounds
        (weights,) = (running.coordinator_state / "weights").glob(f"round-{last:04d}-*.safetensors")
    plans: dict[str, Any] = {}
    for update in (each["result"] for each in record["updates"]):
        if plans.setdefault(update["device_id"], update["plan"])["stages"] != update["plan"]["stages"]:
            raise SystemExit("a device has planned otherwise in another round: nothing can be pinned")
    return weights, plans


def as_devices(folder: Path, plans: dict[str, Any]) -> list[str]:
    """The options that give simulated clients the shares and plans of the devices."""
    shares = [
        {"id": device_id(number), "samples": list(range(number * SHARE, (number + 1) * SHARE))}
        for number in range(len(CAPS))
    ]
    partition = {"how": "by hand", "seed": 0, "samples": 1438, "clients": shares}
    (folder / "partition.json").write_text(json.dumps(partition))
    (folder / "plans.json").write_text(json.dumps(plans))
    return ["--partition", f"file:{folder / 'partition.json'}", "--plans", str(folder / "plans.json")]


def command(job: Path, output: Path, options: Sequence[str], data: str = "digits") -> list[str]:
    return [program("fedepth"), "simulate", str(job), "--data", data, "--output", str(output), *options]


def simulated(job: Path, output: Path, options: Sequence[str]) -> str:
    """The digest of the final weights of a simulation."""
    # Ray's workers have a low priority, and come to a stand on a machine that is busy with other things.
    variables = {**os.environ, "RAY_worker_niceness": "0"}
    with open(output.with_suffix(".log"), "wb") as log:
        subprocess.run(
            command(job, output, options), check=True, stdout=log, stderr=log, timeout=_LIMIT_S, env=variables
        )
    return final_digest(output)


def final_digest(output: Path) -> str:
    last = Record(output).rounds()[-1]
    return file_digest(Record(output).weights(last.weights_round))


def killed_until_done(job: Path, output: Path, options: Sequence[str], seconds: float, console: Console) -> str:
    """The same, of a run that was killed again and again, at moments up to `seconds` after its start or a round."""
    chance = random.Random(SEED)
    kills = 0
    with open(output.with_suffix(".log"), "wb") as log:
        while True:
            process = subprocess.Popen(command(job, output, options), stdout=log, stderr=log, start_new_session=True)
            try:
                # A run that dies before it has done anything can be killed for ever: each has a little longer.
                status = process.wait(chance.uniform(0.3, seconds) * (1 + 0.25 * kills))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                continue
            if status:
                raise SystemExit(f"the run ended with status {status}; see {log.name}")
            console.print(f"killed {kills} times")
            return final_digest(output)


def plain_images_per_second(plain: Plain, loops: int) -> float:
    """Images per second of processor time of so many plain loops, side by side."""
    argv, request = module_argv("benchmarks.plain_training"), msgspec.json.encode(plain)
    env = {**os.environ, **environment("auto", 1)}

    def one(_: int) -> dict[str, float]:
        told = subprocess.run(argv, input=request, check=True, capture_output=True, env=env)
        return msgspec.json.decode(told.stdout, type=dict[str, float])

    with ThreadPoolExecutor(loops) as threads:
        ended = list(threads.map(one, range(loops)))
    return sum(each["images"] for each in ended) / sum(each["cpu_seconds"] for each in ended)


def speed(folder: Path, workers: int, quick: bool, console: Console) -> dict[str, float]:
    """How much of their time workers train, and how fast, against as many plain loops."""
    epochs = 1 if quick else 3
    job = job_file(folder, "speed", model="preresnet20", side=16, devices=4, rounds=3 if quick else 6, epochs=epochs)
    record = Record(folder / "speed")
    record.folder.mkdir()
    options = Options(job=job, data="digits", output=record.folder, clients=4, workers=workers)
    config = load_config(job)

    plain = Plain(model_spec(config), training_spec(config, 1), "digits", str(record.folder / "graph.json"), 2 * epochs)

    async def measured() -> dict[str, float]:
        out = quiet_console(stderr=True)
        out.quiet = True
        reporter = Reporter(out, config.job.rounds)
        simulation = await set_up(options, config, record, reporter.say)
        engine = LocalEngine(workers, 1, reporter.say)
        run = Run(simulation, engine, reporter)
        try:
            await run.open()
            before = plain_images_per_second(plain, workers)
            began = time.monotonic()
            lines = await run.play()
            wall = time.monotonic() - began
            after = plain_images_per_second(plain, workers)
        finally:
            await engine.close()
        return {
            "busy_fraction": engine.busy_seconds / (workers * wall),
            "processor_fraction": sum(engine.cpu_seconds.values()) / (workers * wall),
            "images": float(sum(line.samples_seen for line in lines)),
            "images_per_second": sum(line.samples_seen for line in lines) / engine.cpu_seconds["train"],
            "plain_images_per_second": (before + after) / 2,
        }

    found = asyncio.run(measured())
    found["images_per_second_ratio"] = found["images_per_second"] / found["plain_images_per_second"]
    console.print(
        f"{found['images_per_second']:.0f} images per second of a core, a plain loop "
        f"{found['plain_images_per_second']:.0f}; workers busy {found['busy_fraction']:.0%} of the time"
    )
    return found


def peak_memory(folder: Path, clients: int, images: int, console: Console) -> int:
    """Peak resident memory of a simulation with so many clients, the command and its workers together."""
    data = folder / "noise"
    if not data.exists():
        data.mkdir()
        rng = np.random.default_rng(0)
        for split, count in (("train", images), ("t10k", 256)):
            write_idx(data / f"{split}-images-idx3-ubyte", rng.integers(0, 256, (count, 16, 16), np.uint8))
            write_idx(data / f"{split}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    name = f"memory-{clients}"
    job = job_file(folder, name, side=16, rounds=1, devices=8, epochs=1, test=str(data))
    options = ["--clients", str(clients), "--partition", "dirichlet:0.3", "--workers", "2"]
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(command(job, folder / name, options, str(data)), stdout=log, stderr=log)
        peaks: dict[int, int] = {}
        while process.poll() is None:
            workers = [pid for pid in children(process.pid) if is_worker(pid)]
            for pid in (process.pid, *workers):
                with contextlib.suppress(OSError):  # it has just ended
                    peaks[pid] = max(peaks.get(pid, 0), status_bytes(pid, "VmHWM"))
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"the run ended with status {process.returncode}; see {folder / name}.log")
    # The process that exports the model is gone before the workers train, and as large whatever the clients.
    largest = sorted((peak for pid, peak in peaks.items() if pid != process.pid), reverse=True)
    total = peaks[process.pid] + sum(largest[-2:])
    console.print(f"{clients} clients: {total / MIB:.0f} MiB, the command itself {peaks[process.pid] / MIB:.0f}")
    return total


def children(pid: int) -> list[int]:
    """Child processes of a process."""
    with contextlib.suppress(OSError):
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def is_worker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"simulation.worker.process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def main(
    output: Annotated[Path, typer.Option("--json", help="File for all figures.", dir_okay=False)],
    quick: Annotated[bool, typer.Option(help="Fewer rounds and clients.")] = False,
    only: Annotated[str, typer.Option(help="Only these, of: equal, kill, speed, memory; separated by commas.")] = "",
    folder: Annotated[Path, typer.Option(help="For everything that is written.")] = Path("runs/simulate"),
) -> None:
    """One job in many ways, whose results must be the same."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    folder = folder.resolve()
    chosen = set(only.split(",")) if only else {"equal", "kill", "speed", "memory"}
    figures: dict[str, Any] = {"torch": importlib.metadata.version("torch"), "cores": os.cpu_count()}
    output.parent.mkdir(parents=True, exist_ok=True)

    def note(**more: Any) -> None:
        figures.update(more)
        output.write_text(json.dumps(figures, indent=1) + "\n")

    job = job_file(folder, "equal", augmentation="crop-flip")
    if "equal" in chosen:
        weights, plans = on_devices(folder, job)
        options = as_devices(folder, plans)
        real = file_digest(weights)
        digests = [simulated(job, folder / f"workers-{n}", [*options, "--workers", str(n)]) for n in (1, 2, 3)]
        note(equal_to_processes=digests[0] == real, equal_across_workers=len(set(digests)) == 1)
        console.print(f"devices {real[:12]}, simulated {', '.join(digest[:12] for digest in digests)}")
        if importlib.util.find_spec("ray") is None:
            note(equal_on_ray=None)
            console.print("Ray is not installed: nothing is known of it here")
        else:
            note(equal_on_ray=simulated(job, folder / "ray", [*options, "--engine", "ray", "--workers", "2"]) == real)
    if "kill" in chosen:
        plain_options = ["--clients", "6", "--workers", "2"]
        began = time.monotonic()
        whole = simulated(job, folder / "whole", plain_options)
        seconds = time.monotonic() - began
        broken = killed_until_done(job, folder / "killed", plain_options, 0.6 * seconds, console)
        note(equal_after_kill=whole == broken)
    if "speed" in chosen:
        note(**speed(folder, 2, quick, console))
    if "memory" in chosen:
        images = 10_000
        note(rss_bytes_100_clients=peak_memory(folder, 100, images, console))
        note(rss_bytes_1000_clients=peak_memory(folder, 1000, images, console))
    wrong = [name for name, value in figures.items() if value is False]
    console.print(f"not equal: {', '.join(wrong)}" if wrong else "all that was compared is equal")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
