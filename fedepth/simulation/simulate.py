"""`simulate`: a job with many clients on one machine or a cluster, from its job file to its record."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable

from fedepth.errors import ConfigError, LockedError, StateError
from fedepth.files import disk_errors, lock_file
from fedepth.job_sections import MOST_DEVICES, MOST_SEED, MOST_WORKERS
from fedepth.printable import printable
from fedepth.simulation.engine import Engine, LocalEngine
from fedepth.simulation.progress import Reporter
from fedepth.simulation.record import Record, RoundLine
from fedepth.simulation.run import Run
from fedepth.simulation.setup import Options, Simulation, job_of, set_up
from fedepth.terminal import console

ENGINES = ("local", "ray")


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
            lock = lock_file(record.folder / "lock")
        except LockedError as error:
            raise StateError(
                f"{printable(str(record.folder))} is in use by another simulation (process {error.holder}); wait for "
                "it, or give another --output"
            ) from None
    out = console(stderr=True)
    out.quiet = quiet
    with lock, Reporter(out, config.job.rounds) as reporter:
        try:
            return asyncio.run(_simulated(options, record, reporter, drawn))
        except KeyboardInterrupt:
            reporter.say("stopped; the same command goes on from here")
            raise


def _check(options: Options) -> None:
    """What the command line sees to by itself: without a worker, nothing would ever be trained."""
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
