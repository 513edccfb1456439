"""`simulate`: a job with many clients on one machine or a cluster, from its job file to its record."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fedepth.data.read import DIGITS
from fedepth.errors import ConfigError, LockedError, StateError
from fedepth.files import disk_errors, lock_file
from fedepth.job_sections import MOST_DEVICES, MOST_SEED, MOST_WORKERS
from fedepth.printable import printable
from fedepth.simulation.clients import FULL
from fedepth.simulation.engine import Engine, LocalEngine
from fedepth.simulation.partitions import file_of
from fedepth.simulation.progress import Reporter
from fedepth.simulation.record import LOCK, MADE_FIRST, Record, RoundLine
from fedepth.simulation.run import Run
from fedepth.simulation.setup import Options, Simulation, job_of, set_up
from fedepth.terminal import console

ENGINES = ("local", "ray")
T = TypeVar("T")


def simulate(
    options: Options, *, quiet: bool = False, drawn: Callable[[Simulation], None] | None = None
) -> list[RoundLine]:
    """Runs a simulation, or goes on with one that was interrupted; the lines of its rounds.

    Args:
        quiet: show nothing.
        drawn: called once it is known who takes part.

    Raises:
        FedepthError: something is wrong with what was asked for, or the job cannot go on.
    """
    _check(options)
    config = job_of(options)
    record = Record(options.output.resolve())
    with disk_errors("the simulation cannot be recorded", options.output):
        record.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = lock_file(record.folder / LOCK)
        except LockedError as error:
            raise StateError(
                f"{printable(str(record.folder))} is in use by another simulation (process {error.holder}); wait for "
                "it, or give another --output"
            ) from None
    out = console(stderr=True)
    out.quiet = quiet
    with lock, Reporter(out, config.job.rounds) as reporter:
        try:
            return _run(lambda: _simulated(options, record, reporter, drawn))
        except KeyboardInterrupt:
            reporter.say("stopped; run the same command again to continue")
            raise


def _run(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs what `make` returns to its end, also inside of a running event loop, such as that of a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(make())
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = Future()

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        begun.set_result((asyncio.get_running_loop(), task))
        return await make()

    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(lambda: asyncio.run(main()))
        try:
            return ended.result()
        except KeyboardInterrupt:
            loop, task = begun.result()
            loop.call_soon_threadsafe(task.cancel)
            raise


def _check(options: Options) -> None:
    """What cannot be done, whether it was said on a command line or to the library."""
    if options.budgets is not None and options.tiers != FULL:
        raise ConfigError("--budgets and --tiers both say how much memory clients have; give one of them")
    output = options.output.resolve()
    if options.data == DIGITS and Path(DIGITS).is_dir() and Path(DIGITS).resolve() != output:
        raise ConfigError(
            f"--data {DIGITS} means scikit-learn's digits, and there is a folder of this name: give --data ./{DIGITS} "
            "for that, or go to another folder for the others"
        )
    for name, path in (
        ("partition", file_of(options.partition)),
        ("budgets", options.budgets),
        ("trace", options.trace),
        ("plans", options.plans),
    ):
        # Of a run that is made anew there, they would be gone before they are read.
        if path is not None and path.resolve().parent == output and path.name in MADE_FIRST:
            raise ConfigError(f"--{name} {printable(str(path))} belongs to the run in --output; copy it elsewhere")
    if options.engine not in ENGINES:
        raise ConfigError(f"--engine {options.engine}: there are {', '.join(ENGINES)}")
    for name, value, least, most in (
        ("clients", options.clients, 1, MOST_DEVICES),
        ("seed", options.seed, 0, MOST_SEED),
        ("workers", options.workers, 0, MOST_WORKERS),
        ("threads", options.threads, 1, MOST_WORKERS),
    ):
        if value is not None and not least <= value <= most:
            raise ConfigError(f"--{name} {value}: it must be {least} to {most}")


async def _simulated(
    options: Options, record: Record, reporter: Reporter, drawn: Callable[[Simulation], None] | None
) -> list[RoundLine]:
    simulation = await set_up(options, job_of(options), record, reporter.say)
    if drawn is not None:
        drawn(simulation)
    done = record.rounds()
    if len(done) >= simulation.config.job.rounds:
        return done
    engine = new_engine(options, lambda line: reporter.say(f"worker: {line}"))
    try:
        if done:
            reporter.say(f"going on after round {len(done)}")
        run = Run(simulation, engine, reporter)
        await run.open()
        lines = await run.play()
    finally:
        await engine.close()
    with contextlib.suppress(OSError):  # scratch files; they are in nobody's way
        shutil.rmtree(record.folder / "work")
    return lines


def new_engine(options: Options, on_line: Callable[[str], None]) -> Engine:
    """Whoever runs the workers of a simulation."""
    workers = options.workers or max(1, len(os.sched_getaffinity(0)) // options.threads)
    if options.engine == "ray":
        from fedepth.simulation.ray_engine import RayEngine

        return RayEngine(workers, options.threads)
    return LocalEngine(workers, options.threads, on_line)
