"""What this device's backend and allocator take beside the tensors: measured once, in seconds, and kept on disk.

Small models are trained for a few steps in the real trainer. The first of them is tried with every allocator that is
there: of those whose footprint follows the tensors, the fastest is taken. Then the coefficients of the prediction are
fitted to what all of them took (fedepth.estimate.fit). The record is the machine's, not one agent's: agents that
start together wait for the first of them. It is measured again when torch, the C library, tcmalloc, the processor, the
number of threads, or what a stage may keep of freed memory has changed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from edge_client.config import MemoryConfig, TrainerConfig
from edge_client.identity import recall, remember
from edge_client.measure.trial import TrialModel, trial_request, try_training, write_noise
from edge_client.memory.probe import budget_from, measure
from edge_client.trainer.client import TrainerProcess, torch_version
from edge_client.trainer.protocol import Done
from fedepth import __version__
from fedepth.costs import Calibration
from fedepth.errors import ChildError, LockedError, PlanError, StateError
from fedepth.estimate.fit import MeasuredStage, fit, relative_errors, with_kept
from fedepth.estimate.peak import KEPT_BYTES, KEPT_SHARE, needed_bytes, training_step
from fedepth.estimate.tracer.client import Tracer, tracer
from fedepth.files import disk_errors, lock_file, user_folder
from fedepth.memory.environment import available
from fedepth.models.traced import read_costs
from fedepth.plan import CachePlace, Plan, Policy, Stage
from fedepth.sizes import format_size
from fedepth.task import ModelSpec, TrainingSpec

# An allocator whose footprint is larger than the smallest by more than this does not follow the tensors.
FOLLOWS = 1.25
ROOM = 1.5  # a probe's predicted need times this has to be free
# A tracer takes less than this beside what a trainer takes: sympy, torch._dynamo, the model on paper. 190 MiB were
# measured for ViT-B/16, 122 for a small one.
TRACER_BYTES = 256 << 20
_CPUINFO = Path("/proc/cpuinfo")
_CPU_FIELDS = ("model name", "flags", "CPU implementer", "CPU part", "Features")
_STEPS = 3
_LOOK_S = 0.5

OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class Probe:
    """A small job whose stages are measured: blocks as (first unit, last unit), all with one micro-batch."""

    model: str
    input_shape: tuple[int, ...]
    optimizer: str
    batch: int
    micro_batch: int
    blocks: tuple[tuple[int, int], ...]


# Convolutions with BatchNorm, small, depth-wise, and large in another layout; a transformer; GroupNorm; whole batches
# and accumulation.
PROBES = (
    Probe("preresnet20", (3, 32, 32), "sgd", 64, 64, ((0, 1), (2, 4), (5, 9))),
    Probe("preresnet20", (3, 32, 32), "sgd", 64, 8, ((0, 9),)),
    Probe("mobilenet-v3-small", (3, 64, 64), "sgd", 32, 32, ((0, 12), (13, 25))),
    Probe("resnet18", (3, 64, 64), "sgd", 16, 16, ((1, 3), (4, 5), (6, 7))),
    Probe("vit-tiny", (3, 32, 32), "adamw", 16, 16, ((0, 6), (7, 24))),
    Probe("digits-cnn", (1, 40, 40), "sgd", 32, 32, ((0, 1), (2, 2), (3, 5))),
    Probe("digits-cnn", (1, 40, 40), "sgd", 32, 4, ((0, 5),)),
)


@dataclass(frozen=True)
class AllocatorTrial:
    """What one allocator made of the first probe."""

    allocator: str
    name: str
    peak_bytes: int
    seconds_per_step: float


@dataclass(frozen=True)
class Calibrated:
    """The record on disk.

    Attributes:
        fingerprint: what it depends on; another one asks for a new measurement.
        median_error: of the predicted need, over the stages that it was fitted to.
    """

    fingerprint: str
    calibration: Calibration
    trials: tuple[AllocatorTrial, ...]
    stages: int
    median_error: float


async def calibrated(
    config: TrainerConfig,
    on_progress: OnProgress,
    *,
    memory: MemoryConfig | None = None,
    again: bool = False,
    folder: Path | None = None,
) -> Calibrated:
    """The calibration of this machine: the one on disk, or a new one.

    Args:
        on_progress: called with what is being measured.
        memory: the operator's reserve and fraction; what does not fit into the rest is not tried.
        again: measure even if the record still holds.
        folder: where the record lies; the user's cache folder by default.

    Raises:
        ChildError: no trainer could be started, no allocator could train the first probe, or no peak was measured.
        ModelError: a probe's model cannot be built here, as where torchvision is missing.
        PlanError: too little memory is free to measure anything.
        ConfigError: tcmalloc was asked for by name and is not installed.
        StateError: the folder cannot be written.
    """
    folder = folder or cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "calibration.lock").touch()
    except OSError as error:
        raise StateError(
            f"{folder} cannot hold what is measured here once for all ({error.strerror}); "
            "make it writable, or set XDG_CACHE_HOME to a folder that is"
        ) from None
    fingerprint = _fingerprint(config)
    file = record_file(folder, config)
    async with _locked(folder / "calibration.lock"):
        kept = recall(file, Calibrated)
        if kept and kept.fingerprint == fingerprint and not again:
            return kept
        try:
            # Beside the record, because the system's folder for temporary files may lie in memory.
            with tempfile.TemporaryDirectory(prefix="probes-", dir=folder) as probes:
                found = await _measure(config, memory or MemoryConfig(), fingerprint, Path(probes), on_progress)
        except OSError as error:
            raise StateError(
                f"calibration cannot write its temporary files to {folder} ({error.strerror}); they take about "
                "100 MiB. Free some space there, or set XDG_CACHE_HOME to a folder that has enough"
            ) from None
        remember(file, found)
        return found


def record_file(folder: Path, config: TrainerConfig) -> Path:
    """Where the calibration for these settings lies."""
    return folder / f"calibration-{_threads(config)}-{config.allocator}.json"


def cache_dir(state: str = "") -> Path:
    """`$XDG_CACHE_HOME/fedepth-client`, else below ~/.cache; in the state directory, if one was given, where there is
    no home directory, or none that can be written.

    Raises:
        StateError: there is no such folder.
    """
    try:
        folder = (
            user_folder("XDG_CACHE_HOME", ".cache", "set HOME or XDG_CACHE_HOME to a folder that can be written")
            / "fedepth-client"
        )
    except StateError:
        if not state:
            raise
        return Path(state) / "cache"
    return Path(state) / "cache" if state and not _can_be_written(folder) else folder


def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def choose(trials: tuple[AllocatorTrial, ...]) -> AllocatorTrial:
    """The fastest of those whose footprint follows the tensors."""
    least = min(trial.peak_bytes for trial in trials)
    fit_for_it = [trial for trial in trials if trial.peak_bytes <= FOLLOWS * least]
    return min(fit_for_it, key=lambda trial: trial.seconds_per_step)


def _fingerprint(config: TrainerConfig) -> str:
    libraries = ", ".join(
        f"{name}: {library.resolve().name if library else ''}" for name, library in available().items()
    )
    return (
        f"fedepth {__version__}, torch {torch_version()}, {' '.join(platform.libc_ver())}, {libraries}, "
        f"{_threads(config)} of {os.cpu_count()} threads, processor {_processor()}, GPU {', '.join(measure().cuda)}, "
        f"allocator {config.allocator}, "
        f"allowance {KEPT_SHARE} and {KEPT_BYTES}"
    )


def _threads(config: TrainerConfig) -> int:
    """With how many threads a trainer works; 0 where torch chooses. Settings that mean the same are measured once."""
    by_user = os.environ.get("OMP_NUM_THREADS", "")  # which torch follows where nothing is set
    return config.threads or (int(by_user) if by_user.isascii() and by_user.isdecimal() else 0)


def _processor() -> str:
    """A short digest of the first processor's kind: kernels, and what they copy, depend on it."""
    fields: dict[str, str] = {}
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # hidden, or another system
        text = ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    kind = [platform.machine(), *(fields.get(name, "") for name in _CPU_FIELDS)]
    return hashlib.sha256("\n".join(kind).encode()).hexdigest()[:12]


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """Only one process at a time is inside; others wait, and can be cancelled meanwhile."""
    while True:
        try:
            with disk_errors("calibration cannot take its lock", path.parent):
                file = lock_file(path)
            break
        except LockedError:
            await asyncio.sleep(_LOOK_S)
    with file:
        yield


def fitting(plans: Mapping[Probe, Plan], free_bytes: int) -> list[Probe]:
    """The probes that a device can bear: they run without a limit, so that half as much again has to be free.

    Raises:
        PlanError: not even the smallest fits.
    """
    needs = {probe: int(ROOM * needed_bytes(plan.predicted_peak_bytes)) for probe, plan in plans.items()}
    found = [probe for probe, needed in needs.items() if needed <= free_bytes]
    if not found:
        raise _too_little(min(needs.values()), free_bytes)
    return found


def _too_little(needed: int, free: int) -> PlanError:
    return PlanError(
        f"measuring what training takes here needs {format_size(needed, round_up=True)} of free memory in addition to "
        f"the trainer, but only {format_size(free)} is free. Free some memory, or lower memory.reserve.",
        needed_bytes=needed,
        budget_bytes=free,
    )


async def room_for_tracing(config: TrainerConfig, memory: MemoryConfig) -> int:
    """What is free for a tracer, or for a trainer beyond its start.

    Raises:
        PlanError: less than a tracer takes.
        ChildError: no trainer could be started.
    """
    free = await _free_bytes(config, memory)
    if free < TRACER_BYTES:
        raise _too_little(TRACER_BYTES, free)
    return free


async def _free_bytes(config: TrainerConfig, memory: MemoryConfig) -> int:
    """The budget beside a running trainer. A cap is for tasks: the probes of all agents here are the same."""
    trainer = await TrainerProcess.start(config)
    try:
        uncapped = msgspec.structs.replace(memory, cap=0)
        return budget_from(measure(), trainer.start_bytes, uncapped, trainer.held_bytes).budget_bytes
    finally:
        await trainer.kill()


async def _measure(
    config: TrainerConfig, memory: MemoryConfig, fingerprint: str, folder: Path, on_progress: OnProgress
) -> Calibrated:
    """What fails is reported and left out, as long as one allocator has trained the first probe."""
    names = tuple(available()) if config.allocator == "auto" else (config.allocator,)
    free = await room_for_tracing(msgspec.structs.replace(config, allocator=names[0]), memory)
    on_progress("tracing small models")
    async with tracer() as trace:
        models = {probe: await _prepare(trace, probe, folder) for probe in PROBES}
    first, *others = fitting({probe: _plan(model, probe) for probe, model in models.items()}, free)
    if len(others) + 1 < len(PROBES):
        on_progress(f"{len(others) + 1} of {len(PROBES)} probes fit into what is free; the others are left out")
    trials: list[AllocatorTrial] = []
    firsts: dict[str, Done] = {}
    failed = ""
    for name in names:
        on_progress(f"trying {name}")
        try:
            version, firsts[name] = await _run(config, name, models[first], first, folder)
        except ChildError as error:
            failed = f"{name} cannot be measured: {error}"
            on_progress(failed)
        else:
            trials.append(_trial(name, version, firsts[name]))
    if not trials:
        raise ChildError(f"{failed}. Look at the lines above; without a trainer nothing can be trained here.")
    chosen = choose(tuple(trials)).allocator
    measured = _stages(models[first], first, firsts[chosen])
    peaks = [_peaks(firsts[chosen])]
    for probe in others:
        on_progress(f"{chosen}: {probe.model}, micro-batch {probe.micro_batch}")
        try:
            _, done = await _run(config, chosen, models[probe], probe, folder)
        except ChildError as error:
            on_progress(f"left out: {error}")
        else:
            measured += _stages(models[probe], probe, done)
            peaks.append(_peaks(done))
    if not measured:
        raise ChildError(
            "no probe's peak rose above what its trainer held before, so that nothing was measured; "
            "close other programs and run: fedepth-client calibrate"
        )
    start = replace(Calibration(), allocator=chosen, torch=torch_version())
    # Loads fractions and decimal: only where something is measured, and not where the record of before is read.
    from statistics import median

    need = fit(measured, start)
    errors = [abs(error) for error in relative_errors(measured, need)]
    calibration = with_kept(need, peaks)
    return Calibrated(fingerprint, calibration, tuple(trials), len(errors), median(errors))


async def _prepare(trace: Tracer, probe: Probe, folder: Path) -> TrialModel:
    channels = probe.input_shape[0]
    spec = ModelSpec(probe.model, tuple("0123456789"), probe.input_shape, (0.5,) * channels, (0.25,) * channels)
    training = TrainingSpec(probe.batch, 1, probe.optimizer, 1e-3, 0.9, 5e-4, 0.0, "none", 1)
    graph, weights = folder / f"{probe.model}.json", folder / f"{probe.model}.safetensors"
    if not graph.exists():
        await trace.trace(spec, training, graph, weights)
        write_noise(folder / probe.model, spec, _STEPS * probe.batch)
    return TrialModel(spec, training, read_costs(graph).of(training), graph, weights)


async def _run(
    config: TrainerConfig, allocator: str, model: TrialModel, probe: Probe, folder: Path
) -> tuple[str, Done]:
    """One probe in a trainer of its own: the first task of a process takes the most. Names the allocator's version."""
    trainer = await TrainerProcess.start(msgspec.structs.replace(config, allocator=allocator))
    plan = _plan(model, probe)
    # The budget that lets the trainer keep this plan; the rehearsal bounds what may be kept.
    request = trial_request(
        model, plan, needed_bytes(plan.predicted_peak_bytes), folder / probe.model, folder / "run", enforce=False
    )
    try:
        end = await try_training(trainer, request)
    finally:
        await trainer.kill()
        shutil.rmtree(folder / "run", ignore_errors=True)
    if not isinstance(end, Done):
        raise ChildError(f"calibrating with {probe.model} failed: {end.message}")
    return trainer.allocator, end


def _plan(model: TrialModel, probe: Probe) -> Plan:
    stages = []
    for first, last in probe.blocks:
        peak = training_step(
            model.costs,
            model.training,
            first,
            last,
            probe.micro_batch,
            accumulates=probe.micro_batch < probe.batch,
            cache_bytes=0,
        ).peak
        stages.append(Stage(first, last, probe.micro_batch, CachePlace.DISK, probe.micro_batch, peak))
    return Plan(tuple(stages), (), Policy.AUTO, 0)


def _stages(model: TrialModel, probe: Probe, done: Done) -> list[MeasuredStage]:
    """The rehearsed stages. A peak of 0, hidden below pages that others gave up meanwhile, tells nothing."""
    return [
        MeasuredStage(model.costs, model.training, planned, _STEPS * probe.batch, result.rehearsed_peak_bytes)
        for planned, result in zip(done.result.plan.stages, done.result.stages, strict=True)
        if result.rehearsed_peak_bytes > 0
    ]


def _peaks(done: Done) -> tuple[int, int]:
    """What the plan's worst stage needed in its rehearsal, and its peak in training."""
    stages = done.result.stages
    return max(stage.rehearsed_peak_bytes for stage in stages), max(stage.measured_peak_bytes for stage in stages)


def _trial(allocator: str, version: str, done: Done) -> AllocatorTrial:
    stages = done.result.stages
    seconds = sum(stage.seconds for stage in stages) / sum(stage.steps for stage in stages)
    return AllocatorTrial(allocator, version, max(stage.measured_peak_bytes for stage in stages), seconds)
