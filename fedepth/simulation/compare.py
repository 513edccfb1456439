"""Several simulations side by side: those of one name are seeds of one set-up."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from fedepth.errors import ConfigError, StateError
from fedepth.printable import printable, quoted
from fedepth.simulation.clients import FULL
from fedepth.simulation.partitions import FROM_FILES
from fedepth.simulation.record import Asked, Record, RoundLine


@dataclass(frozen=True)
class Run:
    """One simulation as its folder tells it."""

    folder: Path
    asked: Asked
    rounds: tuple[RoundLine, ...]

    @property
    def name(self) -> str:
        return self.asked.name

    @property
    def seed(self) -> int:
        return self.asked.seed

    @property
    def accuracies(self) -> tuple[tuple[int, float], ...]:
        """Round and accuracy, where that is known; of a round that was not published, that of the model before."""
        found: list[tuple[int, float]] = []
        for line in self.rounds:
            if line.published and line.accuracy is not None:
                found.append((line.round, line.accuracy))
            elif found:
                found.append((line.round, found[-1][1]))
        return tuple(found)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of the sample; 0 of one value) over seeds."""

    mean: float
    std: float


@dataclass(frozen=True)
class Comparison:
    """Runs of one name.

    Attributes:
        rounds: that all of them have closed; what follows is of these.
        final: accuracy after the last of them; None where there is no test data.
        best: the highest accuracy.
        steps, samples_seen, seconds, bytes_down, bytes_up: means over the runs, of all rounds together.
        peaks: by tier, the largest measured peak of any run.
    """

    name: str
    seeds: tuple[int, ...]
    rounds: int
    final: Spread | None
    best: Spread | None
    steps: float
    samples_seen: float
    seconds: float
    bytes_down: float
    bytes_up: float
    peaks: dict[str, int]


def read_run(folder: Path) -> Run:
    """Reads what a simulation has recorded so far.

    Raises:
        StateError: there is none, or it is damaged.
    """
    record = Record(folder)
    asked = record.read("run.json", Asked)
    if asked is None:
        raise StateError(f"{printable(str(folder))} holds no simulation; give the --output of fedepth simulate")
    lines = record.rounds()
    if not lines:
        raise StateError(f"{printable(str(folder))} has no closed round yet")
    return Run(folder, asked, tuple(lines))


def compare(runs: Sequence[Run]) -> tuple[Comparison, ...]:
    """The runs by their names, in the order in which those come first.

    Raises:
        ConfigError: runs of one name are no seeds of one set-up.
    """
    names = dict.fromkeys(run.name for run in runs)
    for name in names:
        _check_seeds([run for run in runs if run.name == name])
    return tuple(_compared(name, [run for run in runs if run.name == name]) for name in names)


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def _check_seeds(runs: Sequence[Run]) -> None:
    first = runs[0]
    seen: dict[int, Run] = {}
    for run in runs:
        other = seen.setdefault(run.seed, run)
        if other is not run:
            raise _no_seeds(other, run, f"have the same seed, {run.seed}")
        if different := [what for what, same in _SAME.items() if not same(first.asked, run.asked)]:
            raise _no_seeds(first, run, f"differ in {' and '.join(different)}")


def _no_seeds(one: Run, other: Run, why: str) -> ConfigError:
    return ConfigError(
        f"{printable(str(one.folder))} and {printable(str(other.folder))} are both called {quoted(one.name)}, which "
        f"makes them seeds of one set-up, but they {why}; leave one out, or give fedepth simulate another --name"
    )


def _job(asked: Asked) -> Any:
    try:
        job = msgspec.toml.decode(asked.job_file)
    except msgspec.DecodeError:
        return asked.job_file
    job.get("job", {}).pop("seed", None)
    return job


def _same_partition(one: Asked, other: Asked) -> bool:
    """Each seed may have a file of its own."""
    kinds = {asked.partition.partition(":")[0] for asked in (one, other)}
    return one.partition == other.partition or (len(kinds) == 1 and kinds <= FROM_FILES)


def _same_memory(one: Asked, other: Asked) -> bool:
    """What was measured in a run may be given to the next."""
    if bool(one.budgets) == bool(other.budgets):
        return (one.tiers, one.budgets) == (other.tiers, other.budgets)
    return (other if one.budgets else one).tiers != FULL


def _same_field(field: str, one: Asked, other: Asked) -> bool:
    return bool(getattr(one, field) == getattr(other, field))


_SAME: Mapping[str, Callable[[Asked, Asked], bool]] = {
    "job file": lambda one, other: bool(_job(one) == _job(other)),
    "data": lambda one, other: one.data == other.data,
    "partition": _same_partition,
    "tiers": _same_memory,
    **{
        field: partial(_same_field, field)
        for field in ("clients", "trace", "plans", "weights", "tokenizer", "module", "enforce", "threads")
    },
}


def _compared(name: str, runs: Sequence[Run]) -> Comparison:
    rounds = min(len(run.rounds) for run in runs)
    histories = [[accuracy for number, accuracy in run.accuracies if number <= rounds] for run in runs]
    known = all(histories)
    lines = [run.rounds[:rounds] for run in runs]

    def total(field: str) -> float:
        return statistics.fmean(sum(getattr(line, field) for line in each) for each in lines)

    peaks: dict[str, int] = {}
    for each in lines:
        for line in each:
            for tier, figures in line.tiers.items():
                peaks[tier] = max(peaks.get(tier, 0), figures.measured_peak_bytes)
    return Comparison(
        name=name,
        seeds=tuple(run.seed for run in runs),
        rounds=rounds,
        final=spread([history[-1] for history in histories]) if known else None,
        best=spread([max(history) for history in histories]) if known else None,
        steps=total("steps"),
        samples_seen=total("samples_seen"),
        seconds=total("seconds"),
        bytes_down=total("bytes_down"),
        bytes_up=total("bytes_up"),
        peaks=peaks,
    )
