"""The record of a job: rounds, devices, tasks, updates and failures, in SQLite (STATE/job.sqlite).

A file is made durable, with its folder, before the record that names it is committed: the record decides.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from coordinator.store.files import Files, lock_state
from coordinator.store.tables import devices, failures, job, metadata, open_engine, rounds, tasks, updates
from fedepth.errors import StateError
from fedepth.files import NOT_JSON, file_digest
from fedepth.layout import ModelLayout
from fedepth.plan import Plan
from fedepth.task import DeviceReport, ModelSpec, Result, TrainingSpec


@dataclass(frozen=True)
class RoundRecord:
    """A finished round; 0 is the start, with nothing trained. Accuracy is a fraction, -1 if unknown."""

    round: int
    digest: str
    size_bytes: int
    closed_at: float
    devices: int
    samples: int
    accuracy: float = -1.0
    loss: float = -1.0
    export_path: str = ""
    parity_max_abs: float = -1.0


@dataclass(frozen=True)
class TaskRecord:
    """A task as it was handed out. `status` is one of given, accepted, refused, failed, lost."""

    task_id: str
    round: int
    device_id: str
    attempt: int
    status: str
    plan: Plan
    sample_count: int


@dataclass(frozen=True)
class Prepared:
    """What the model worker found out about the model; its graph and costs lie in a file of this digest and size."""

    layout: ModelLayout
    training: TrainingSpec
    graph_digest: str
    graph_bytes: int


class Store:
    """The record of one job. Methods are short transactions; those that hash files say so.

    Attributes:
        directory: the state directory.
        files: what lies in it beside the record.
    """

    def __init__(self, directory: Path, engine: sa.Engine, lock: IO[str] | None) -> None:
        self.directory = directory
        self.files = Files(directory)
        self._engine = engine
        self._lock = lock

    @classmethod
    def open(cls, directory: Path, name: str, model: ModelSpec) -> Store:
        """Opens or creates the state of this job, and keeps others out.

        Raises:
            StateError: another coordinator has it, or it holds a job with another model.
        """
        directory = directory.resolve()  # the record names files in it, for whoever reads it from elsewhere
        Files(directory).create()
        lock = lock_state(directory)
        engine = open_engine(directory / "job.sqlite")
        store = cls(directory, engine, lock)
        try:
            metadata.create_all(engine)
            store._adopt(name, model)
        except StateError:
            store.close()
            raise
        except sa.exc.DatabaseError as error:
            store.close()
            raise StateError(
                f"{directory / 'job.sqlite'} cannot be read: {error.orig}; restore it or use a new --state"
            ) from None
        return store

    @classmethod
    def read(cls, directory: Path) -> Store:
        """Opens an existing state for reading, beside a running coordinator if need be.

        Raises:
            StateError: there is none.
        """
        path = directory / "job.sqlite"
        if not path.is_file():
            raise StateError(f"{directory} holds no job: {path.name} is missing; give the --state of a coordinator")
        return cls(directory, open_engine(path), None)

    def close(self) -> None:
        self._engine.dispose()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _adopt(self, name: str, model: ModelSpec) -> None:
        row = self._one(sa.select(job))
        if row is None:
            values = {
                "id": 1,
                "name": name,
                "run_id": uuid.uuid4().hex[:12],
                "model": _json(model),
                "prepared": "",
            }
            self._write(job.insert().values({**values, "created_at": time.time()}))
            return
        held = msgspec.json.decode(row["model"], type=ModelSpec)
        for field in ("name", "classes", "input_shape", "mean", "std", "input_type"):
            before, now = getattr(held, field), getattr(model, field)
            if before != now:
                raise StateError(
                    f"{self.directory} holds job {row['name']} with [model] {field} {before!r}, "
                    f"this job has {now!r}; use another --state"
                )
        self._write(job.update().values(name=name))

    # --- the job and its weights

    @property
    def run_id(self) -> str:
        """Names this state directory for ever: no task of another one can be mistaken for one of ours."""
        return str(self._require(sa.select(job))["run_id"])

    @property
    def job_name(self) -> str:
        return str(self._require(sa.select(job))["name"])

    def prepared(self) -> Prepared | None:
        """What was recorded; None if nothing was, or by a version that knew no graphs, or if the graph's file is not
        the recorded one: it can be found out again."""
        text = self._require(sa.select(job))["prepared"]
        try:
            found = msgspec.json.decode(text, type=Prepared) if text else None
        except NOT_JSON:
            return None
        path = self.files.graph()
        return found if found and path.is_file() and file_digest(path) == found.graph_digest else None

    def record_prepared(self, prepared: Prepared) -> None:
        self._write(job.update().values(prepared=_json(prepared)))

    def seal_weights(self, partial: Path, round_number: int, devices: int, samples: int) -> RoundRecord:
        """Moves new weights to their place and makes them durable, by a hash; `record_round` is next."""
        digest, size = self.files.seal_weights(partial, round_number)
        return RoundRecord(round_number, digest, size, time.time(), devices, samples)

    def record_round(self, record: RoundRecord) -> None:
        self._write(insert(rounds).values(_row(record)))

    def latest_round(self) -> RoundRecord | None:
        row = self._one(sa.select(rounds).order_by(rounds.c.round.desc()).limit(1))
        return None if row is None else RoundRecord(**row)

    def rounds(self) -> list[RoundRecord]:
        return [RoundRecord(**row) for row in self._all(sa.select(rounds).order_by(rounds.c.round))]

    def find_weights(self, digest: str) -> RoundRecord | None:
        row = self._one(sa.select(rounds).where(rounds.c.digest == digest).order_by(rounds.c.round).limit(1))
        return None if row is None else RoundRecord(**row)

    def verify_latest(self) -> None:
        """Compares the latest weights with their record. Hashes the file.

        Raises:
            StateError: they are missing or damaged.
        """
        record = self.latest_round()
        if record is not None:
            self.files.verify_weights(record.round, record.digest)

    def set_evaluation(self, round_number: int, accuracy: float, loss: float) -> None:
        self._write(rounds.update().where(rounds.c.round == round_number).values(accuracy=accuracy, loss=loss))

    def set_export(self, round_number: int, path: str, parity_max_abs: float) -> None:
        change = rounds.update().where(rounds.c.round == round_number)
        self._write(change.values(export_path=path, parity_max_abs=parity_max_abs))

    # --- devices, tasks, updates

    def see_device(self, report: DeviceReport) -> None:
        now = time.time()
        known = {"name": report.name, "report": _json(report), "last_seen": now}
        first = {"device_id": report.device_id, "first_seen": now, **known}
        self._write(insert(devices).values(first).on_conflict_do_update(index_elements=["device_id"], set_=known))

    def device_names(self) -> dict[str, str]:
        return {row["device_id"]: row["name"] for row in self._all(sa.select(devices))}

    def record_task(self, record: TaskRecord) -> None:
        values = {**_row(record), "plan": _json(record.plan), "given_at": time.time()}
        again = {key: values[key] for key in ("attempt", "status", "plan", "sample_count", "given_at")}
        self._write(insert(tasks).values(values).on_conflict_do_update(index_elements=["task_id"], set_=again))

    def end_task(self, task_id: str, status: str, reason: str, message: str) -> None:
        """Records that a task was refused, failed or lost, and counts it."""
        with self._engine.begin() as connection:
            connection.execute(tasks.update().where(tasks.c.task_id == task_id).values(status=status))
            values = {"task_id": task_id, "status": status, "reason": reason, "message": message[:2000]}
            connection.execute(failures.insert().values({**values, "at": time.time()}))

    def count_refusal(self, task_id: str, reason: str, message: str) -> None:
        """Counts a refusal that ends no task: a late update, or one that came from another device."""
        values = {"task_id": task_id[:200], "status": "refused", "reason": reason, "message": message[:2000]}
        self._write(failures.insert().values({**values, "at": time.time()}))

    def task(self, task_id: str) -> TaskRecord | None:
        row = self._one(sa.select(tasks).where(tasks.c.task_id == task_id))
        return None if row is None else _task(row)

    def tasks_of(self, round_number: int) -> list[TaskRecord]:
        query = sa.select(tasks).where(tasks.c.round == round_number).order_by(tasks.c.task_id)
        return [_task(row) for row in self._all(query)]

    def record_update(self, result: Result) -> None:
        """Accepts an update for good: after this it is part of its round. Its files are durable already."""
        values = {
            "task_id": result.task_id,
            "round": result.round,
            "device_id": result.device_id,
            "result": _json(result),
            "size_bytes": sum(part.size_bytes for part in result.parts),
            "received_at": time.time(),
        }
        with self._engine.begin() as connection:
            connection.execute(updates.insert().values(values))
            connection.execute(tasks.update().where(tasks.c.task_id == result.task_id).values(status="accepted"))

    def update(self, task_id: str) -> Result | None:
        row = self._one(sa.select(updates).where(updates.c.task_id == task_id))
        return None if row is None else msgspec.json.decode(row["result"], type=Result)

    def updates_of(self, round_number: int) -> list[Result]:
        """In the order of their task ids, whenever they came."""
        query = sa.select(updates).where(updates.c.round == round_number).order_by(updates.c.task_id)
        return [msgspec.json.decode(row["result"], type=Result) for row in self._all(query)]

    def failure_counts(self) -> dict[str, int]:
        """How often each "status/reason" happened."""
        query = sa.select(failures.c.status, failures.c.reason, sa.func.count().label("times")).group_by(
            failures.c.status, failures.c.reason
        )
        return {f"{row['status']}/{row['reason']}": int(row["times"]) for row in self._all(query)}

    def drop_spools_before(self, round_number: int) -> None:
        """Deletes every spool but those of tasks of this round or a later one."""
        kept = self._all(sa.select(tasks.c.task_id).where(tasks.c.round >= round_number))
        self.files.keep_spools({row["task_id"] for row in kept})

    # --- queries

    def _write(self, statement: sa.Executable) -> None:
        with self._engine.begin() as connection:
            connection.execute(statement)

    def _all(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def _one(self, query: sa.Select[Any]) -> dict[str, Any] | None:
        found = self._all(query)
        return found[0] if found else None

    def _require(self, query: sa.Select[Any]) -> dict[str, Any]:
        row = self._one(query)
        if row is None:
            raise StateError(f"{self.directory} holds no job yet; start the coordinator on it first")
        return row


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _row(record: RoundRecord | TaskRecord) -> dict[str, Any]:
    return dict(vars(record))


def _task(row: Mapping[str, Any]) -> TaskRecord:
    plan = msgspec.json.decode(row["plan"], type=Plan)
    return TaskRecord(
        row["task_id"],
        row["round"],
        row["device_id"],
        row["attempt"],
        row["status"],
        plan,
        row["sample_count"],
    )
