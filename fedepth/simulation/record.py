"""The files of a simulation: what was asked, who took part, and one JSON line for every round that is closed.

    run.json           what was asked for; once a task is trained, another simulation is refused in the same folder
    prepared.json      of the job's model: its layout, and the digests of what it begins with
    graph.json         the model as workers are given it
    data-check*        which image files are damaged, and which are not (fedepth.data.damage)
    partition.json     who has which samples
    statistics.json    mean and standard deviation of a table's columns, where the job leaves them to its clients
    tiers.json         budgets, and how they were found
    rounds.jsonl       the rounds that are closed
    weights/           global weights after a round
    clients/           what clients keep for themselves: peers (fedepth.peers), residuals (fedepth.residuals)
    updates/           of the rounds that are not closed: trained tasks, each whole or not at all
    work/              scratch files of the workers, until the run has ended
    partition.png, accuracy.png

Nothing else lies there: a folder with files in it and without run.json is somebody's own, and refused. A run that
ended anywhere goes on from here: rounds are played again from the last line, and tasks that are trained lie in
updates/.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog

from fedepth.errors import ConfigError, StateError
from fedepth.files import NOT_JSON, disk_errors, read_regular, write_atomically
from fedepth.layout import ModelLayout
from fedepth.peers import Peers
from fedepth.printable import printable
from fedepth.residuals import Residuals
from fedepth.simulation.worker.protocol import RESULT
from fedepth.task import Result

VERSION = 1
PEERS = "peers"  # in the folder of an update: those that its client is to keep
RESIDUALS = "residuals"  # the same of these
STATISTICS = "statistics.json"
LOCK = "lock"
PARTITION_PICTURE = "partition.png"
_RUN = "run.json"
MADE_FIRST = ("prepared.json", "tiers.json", "partition.json", STATISTICS, PARTITION_PICTURE)
_MOST_BYTES = 1 << 30
T = TypeVar("T")


class Asked(msgspec.Struct, frozen=True):
    """What decides on the results of a simulation. Workers, engine and their threads' scheduling do not.

    Attributes:
        job_file: its text.
        clients: None where the partition says how many.
        threads: of every worker: other numbers of threads add up in another order.
        budgets: what the file with reports holds; so with trace and plans. Empty without one.
        weights: digest of the file that the model begins with; so with tokenizer and the module of a custom model.
    """

    version: int
    name: str
    job_file: str
    data: str
    clients: int | None
    partition: str
    tiers: str
    seed: int
    threads: int
    enforce: bool
    budgets: str = ""
    trace: str = ""
    plans: str = ""
    weights: str = ""
    tokenizer: str = ""
    module: str = ""


class Prepared(msgspec.Struct, frozen=True):
    """The job's model, prepared."""

    layout: ModelLayout
    notes: tuple[str, ...]
    digest: str
    graph_digest: str
    graph_bytes: int


class TierLine(msgspec.Struct, frozen=True):
    """What the clients of a tier did in a round; peaks are the largest."""

    updates: int
    blocks: tuple[str, ...]
    budget_bytes: int
    predicted_peak_bytes: int
    measured_peak_bytes: int
    steps: int
    samples_seen: int
    seconds: float


class ClientLine(msgspec.Struct, frozen=True):
    """What one client did in a round.

    Attributes:
        end: "update", or what became of its task.
        steps: optimizer steps of all stages.
        seconds: of its worker.
    """

    client: str
    tier: str
    end: str
    blocks: str = ""
    samples: int = 0
    predicted_peak_bytes: int = 0
    measured_peak_bytes: int = 0
    budget_bytes: int = 0
    steps: int = 0
    samples_seen: int = 0
    seconds: float = 0.0
    loss: float = 0.0


class RoundLine(msgspec.Struct, frozen=True):
    """A closed round.

    Attributes:
        accuracy: on the job's test data; None where it has none.
        published: whether its weights are in force; else `note` says why not.
        ended_at: in simulated seconds.
        seconds: of the clock, since the round before was closed.
        weights_digest: of the weights in force; `weights_round` is the round that they are of.
    """

    round: int
    accuracy: float | None
    loss: float | None
    published: bool
    note: str
    updates: int
    samples: int
    steps: int
    samples_seen: int
    predicted_peak_bytes: int
    measured_peak_bytes: int
    bytes_down: int
    bytes_up: int
    seconds: float
    simulated_seconds: float
    ended_at: float
    weights_digest: str
    weights_round: int
    notes: tuple[str, ...]
    tiers: dict[str, TierLine]
    clients: tuple[ClientLine, ...]


class Record:
    """The folder of one simulation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, asked: Asked) -> None:
        """Makes the folder, or finds the same simulation in it.

        Raises:
            ConfigError: another one lies there, or something else.
            DiskError: it cannot be written.
        """
        with disk_errors("the simulation cannot be recorded", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            known = self.read(_RUN, Asked)
            if known is None:
                self._check_empty()
            if known is None or (known != asked and not self._has_trained()):
                # What was made for other options that came to nothing, such as those with a mistake.
                for name in MADE_FIRST:
                    (self.folder / name).unlink(missing_ok=True)
                write_atomically(self.folder / _RUN, msgspec.json.encode(asked) + b"\n")
            elif known != asked:
                fields = [name for name in Asked.__struct_fields__ if getattr(known, name) != getattr(asked, name)]
                raise ConfigError(
                    f"{printable(str(self.folder))} holds another simulation, with other {', '.join(fields)}; give "
                    "another --output, or delete that folder"
                )
            for name in ("weights", "updates"):
                (self.folder / name).mkdir(exist_ok=True)
            self._delete_unfinished()
            whole = self._whole_lines()
            if self._rounds_path.exists() and self._rounds_path.stat().st_size > len(whole):
                os.truncate(self._rounds_path, len(whole))

    def _check_empty(self) -> None:
        """Sees that nothing lies here that a run could delete or go on from."""
        names = (path.name for path in self.folder.iterdir())
        found = sorted(name for name in names if name != LOCK and not name.startswith(f".{_RUN}."))
        if found:
            raise ConfigError(
                f"--output {printable(str(self.folder))} is not the folder of a simulation: it holds "
                f"{printable(found[0])}{f' and {len(found) - 1} more' if len(found) > 1 else ''}, and no {_RUN}; "
                "give a new or an empty one"
            )

    def _delete_unfinished(self) -> None:
        """Deletes what is left of writes that were cut short (fedepth.files.replacing)."""
        names = (_RUN, "graph.json", "data-check", "accuracy.png", *MADE_FIRST)
        leftovers = [path for name in names for path in self.folder.glob(f".{name}*.tmp")]
        for name in ("weights", "updates", "clients"):
            leftovers += (self.folder / name).rglob(".*.tmp")
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)

    def _has_trained(self) -> bool:
        return bool(self._whole_lines()) or any((self.folder / "updates").glob("*/*"))

    def read(self, name: str, kind: type[T]) -> T | None:
        """One of the JSON files; None where it is not there.

        Raises:
            StateError: it is damaged.
        """
        path = self.folder / name
        try:
            return msgspec.json.decode(read_regular(path, _MOST_BYTES), type=kind)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, *NOT_JSON) as error:
            raise StateError(f"{printable(str(path))} cannot be read: {error}; delete it, or its folder") from None

    def write(self, name: str, value: Any) -> None:
        """Writes one of the JSON files, durably."""
        with disk_errors("the simulation cannot be recorded", self.folder):
            write_atomically(self.folder / name, msgspec.json.encode(value) + b"\n")

    def weights(self, number: int) -> Path:
        """Where the weights of a round lie."""
        return self.folder / "weights" / f"round-{number:04d}.safetensors"

    def update(self, number: int, task_id: str, attempt: int) -> Path:
        """Where the update of a task lies."""
        return self.folder / "updates" / f"round-{number:04d}" / f"{task_id}-{attempt}"

    def peers(self, client: int) -> Peers:
        """The other models of a client, by its place, where the job has mutual distillation."""
        return Peers(self._client(client), _warnings())

    def residuals(self, client: int) -> Residuals:
        """What the encoding has left out of a client's updates, by its place."""
        return Residuals(self._client(client), _warnings())

    def _client(self, client: int) -> Path:
        return self.folder / "clients" / f"{client:06d}"

    def trained(self, folder: Path, weights_digest: str) -> Result | None:
        """An update that was trained before from these weights; None if there is none."""
        try:
            result = msgspec.json.decode(read_regular(folder / RESULT, _MOST_BYTES), type=Result)
        except (OSError, *NOT_JSON):
            return None
        whole = all(
            path.exists() and path.stat().st_size == part.size_bytes
            for path, part in zip(part_paths(folder, result), result.parts, strict=True)
        )
        return result if whole and result.weights_digest == weights_digest else None

    def rounds(self) -> list[RoundLine]:
        """The closed rounds, without a last line that was cut short or is just being written.

        Raises:
            StateError: a line is damaged, or none can be read.
        """
        return decode_rounds(self._whole_lines(), self._rounds_path)

    @property
    def _rounds_path(self) -> Path:
        return self.folder / "rounds.jsonl"

    def _whole_lines(self) -> bytes:
        try:
            data = read_regular(self._rounds_path, _MOST_BYTES)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise StateError(f"{printable(str(self._rounds_path))} cannot be read: {error.strerror}") from None
        return data[: data.rfind(b"\n") + 1]

    def close_round(self, line: RoundLine) -> None:
        """Adds a round's line, durably, and deletes what only that round needed."""
        with disk_errors("the simulation cannot be recorded", self.folder):
            with open(self._rounds_path, "ab", buffering=0) as file:
                file.write(msgspec.json.encode(line) + b"\n")
                os.fsync(file.fileno())
            shutil.rmtree(self.folder / "updates" / f"round-{line.round:04d}", ignore_errors=True)

    def keep_weights(self, numbers: Sequence[int]) -> None:
        """Deletes the weights of all other rounds."""
        kept = {self.weights(number) for number in numbers}
        for path in (self.folder / "weights").glob("round-*.safetensors"):
            if path not in kept:
                path.unlink(missing_ok=True)


def _warnings() -> Any:
    """Of hundreds of clients, only what is wrong; and not on standard output, which belongs to results."""
    warnings = structlog.make_filtering_bound_logger(logging.WARNING)
    return structlog.wrap_logger(structlog.PrintLogger(sys.stderr), wrapper_class=warnings)


def decode_rounds(data: bytes, path: Path) -> list[RoundLine]:
    """Raises StateError: a line is no round."""
    try:
        return [msgspec.json.decode(line, type=RoundLine) for line in data.splitlines()]
    except NOT_JSON as error:
        raise StateError(f"{printable(str(path))} is damaged: {error}") from None


def part_paths(folder: Path, result: Result) -> tuple[Path, ...]:
    """Where the parts of an update lie, in the order of its result."""
    return tuple(folder / part.file_name for part in result.parts)
