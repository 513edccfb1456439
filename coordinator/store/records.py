"""The durable state of a job: its record (a database), and its files, which the record decides about.

A file is made durable, with its folder, before the record that names it is committed. What goes is recorded before it
is deleted.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any, ParamSpec, TypeVar

import msgspec
import sqlalchemy as sa

from coordinator.store.backup import Backup, back_up
from coordinator.store.comparison import compare, note_missing, waiting_updates
from coordinator.store.database import Database
from coordinator.store.entries import (
    EndedTask,
    FailureKind,
    Prepared,
    RecordedChange,
    RoundRecord,
    Sealed,
    Summary,
    TaskRecord,
    to_json,
)
from coordinator.store.files import GRAPH, Files, lock_state, part_name, weights_name
from coordinator.store.retention import finish_drops
from coordinator.store.round_store import RoundStore, new_run_id
from coordinator.store.storage import Directory, Storage
from coordinator.store.tables import changes, job
from coordinator.store.task_store import TaskStore
from fedepth.data.column_sums import Statistics
from fedepth.errors import StateError, UnavailableError
from fedepth.files import NOT_JSON, real_folder
from fedepth.job_changes import Change, Kind, Settings, differences, recorded_settings
from fedepth.printable import printable
from fedepth.task import Heads, ModelSpec

__all__ = ["Backup", "EndedTask", "FailureKind", "Prepared", "RoundRecord", "Sealed", "Store", "Summary", "TaskRecord"]

_THREADS = 4  # for short calls: SQLite has one writer at a time, and a server is not asked more at once

P = ParamSpec("P")
T = TypeVar("T")


class Store(RoundStore, TaskStore):
    """The state of one job. Methods are short transactions; those that hash or move files say so.

    None is for an event loop, which would stand still for as long as a disk, a server or a bucket does: see `short`
    for short transactions, and `asyncio.to_thread` for the others.

    Every method may be repeated after an error. UnavailableError means that the database or a disk does not work just
    now; any other StateError, that the call or the state is wrong.

    Attributes:
        directory: the state directory.
        files: what lies in it beside the record.
    """

    def __init__(self, directory: Path, database: Database, files: Files, lock: IO[str] | None) -> None:
        self.directory = directory
        self.files = files
        self._database = database
        self._lock = lock
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="record")

    @classmethod
    def open(
        cls,
        directory: Path,
        name: str,
        model: ModelSpec,
        *,
        database: str = "",
        files: str = "",
        settings: Settings | None = None,
    ) -> Store:
        """Opens or creates the state of this job, and keeps others out. Hashes the weights in force.

        Args:
            database: URL of a PostgreSQL database; "" for SQLite in the directory.
            files: URL of a bucket, such as s3://bucket/prefix; "" for the directory.
            settings: of the job, recorded if it is a new one. What they change of a job that has begun, its model too,
                is then for the caller to ask (`changed`) and to take over.

        Raises:
            StateError: another coordinator has it, it is of a later version of fedepth, or something in it is damaged,
                missing, or does not fit the rest; or, without `settings`, it holds a job with another model.
        """
        store = cls._locked(directory, database, files)
        try:
            compare(store._database, store.files)
            store._adopt(name, model, settings)
            store._finish()
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def open_to_repair(cls, directory: Path, *, database: str = "", files: str = "") -> Store:
        """Opens an existing state as it is, and keeps others out: for a rollback, when `open` refuses it.

        Raises:
            StateError: another coordinator has it, or there is no record that can be read.
        """
        Store.read(directory, database=database, files=files).close()  # nothing is created where nothing is
        return cls._locked(directory, database, files)

    @classmethod
    def read(cls, directory: Path, *, database: str = "", files: str = "") -> Store:
        """Opens an existing state for reading, beside a running coordinator if need be.

        Raises:
            StateError: there is none, or it is of another version.
        """
        directory = real_folder(directory)
        opened = Database(directory, database)
        try:
            opened.open_for_reading()
            return cls(directory, opened, Files(directory, _storage(directory, files)), None)
        except BaseException:
            opened.close()
            raise

    @classmethod
    def _locked(cls, directory: Path, database: str, files: str) -> Store:
        directory = real_folder(directory)  # the record names files in it, for whoever reads it from elsewhere
        opened = Database(directory, database)
        place = Files(directory, _storage(directory, files))
        place.create()
        lock = lock_state(directory)
        store = cls(directory, opened, place, lock)
        try:
            opened.open()
        except BaseException:
            store.close()
            raise
        return store

    async def short(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """One of the short calls, in a thread of the record's own: they wait for nothing that hashes or moves files."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *args, **kwargs))

    def close(self) -> None:
        self._threads.shutdown()
        self._database.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def answer_promptly(self) -> None:
        """For when devices wait for what is recorded; see `Database.answer_promptly`."""
        self._database.answer_promptly()

    def check_hold(self) -> None:
        """Sees that nobody else has had the record since it was opened; see `Database.check_hold`."""
        self._database.check_hold()

    def _adopt(self, name: str, model: ModelSpec, settings: Settings | None) -> None:
        row = self._database.row(sa.select(job))
        if row is None:
            values = {
                "id": 1,
                "name": name,
                "run_id": new_run_id(),
                "model": to_json(model),
                "prepared": "",
                "settings": "" if settings is None else to_json(settings),
                "statistics": "",
                "created_at": time.time(),
            }
            self._database.write(job.insert().values(values))
            return
        if settings is not None:
            return
        held = msgspec.json.decode(row["model"], type=ModelSpec)
        for field in ("name", "classes", "input_shape", "mean", "std", "input_type", "text", "table"):
            before, now = getattr(held, field), getattr(model, field)
            if before != now:
                raise StateError(
                    f"{self.directory} holds job {row['name']} with [model] {field} {before!r}, "
                    f"this job has {now!r}; use another --state"
                )
        self._database.write(job.update().values(name=name))

    def _finish(self) -> None:
        """Does what a crash may have left undone."""
        latest = self.latest_round()
        if latest is not None:
            self.weights_in_force()  # before a record that is newer than the files lets any of them go
        finish_drops(self._database, self.files)
        self.files.remove_partial()
        if latest is None:
            return
        if latest.aside_digest:
            self._move_aside(latest)
        in_force = self.find_weights(latest.digest)
        assert in_force is not None
        self.files.storage.ready(weights_name(in_force.round, in_force.digest), in_force.digest)
        for result in waiting_updates(self._database, latest.round):
            for part in result.parts:
                self.files.storage.ready(part_name(result.task_id, result.attempt, part.part), part.digest)
        if self.prepared() is not None:
            self.files.storage.keep(GRAPH)
        note_missing(self._database, self.files, latest)
        self.drop_spools_before(latest.round + 1)
        self._database.checkpoint()

    # --- the job

    @property
    def run_id(self) -> str:
        """Names this run of the job for ever: no task of another one can be mistaken for one of ours."""
        return str(self._job()["run_id"])

    @property
    def job_name(self) -> str:
        return str(self._job()["name"])

    def changed(self, settings: Settings) -> list[Change]:
        """What these settings change of those that the job had last.

        Of a job that an earlier version began, only what follows from its model and from what was prepared is known.
        One that has no weights yet, since its first start failed, has not begun: all of it may be put right.
        """
        row = self._job()
        if self.latest_round() is None:
            return []
        known = row["settings"]
        held = recorded_settings(msgspec.json.decode(known)) if known else _known_settings(row)
        return differences(held, settings)

    def take_over(self, model: ModelSpec, settings: Settings, changed: Sequence[Change]) -> int:
        """Records the settings that hold from now on, and what they change. Returns the first round that they hold for.

        Nothing is asked here: see `fedepth.job_changes.refusal`.
        """
        latest = self.latest_round()
        first = 1 if latest is None else latest.round + 1
        with self._database.begin() as connection:
            values = {"name": settings["job.name"], "model": to_json(model), "settings": to_json(settings)}
            connection.execute(job.update().values(values))
            for change in changed:
                values = {
                    "round": first,
                    "setting": change.setting,
                    "before": to_json(change.before),
                    "now": to_json(change.now),
                    "accepted": change.kind is Kind.ASKS,
                    "at": time.time(),
                }
                connection.execute(changes.insert().values(values))
        return first

    def changes(self) -> list[RecordedChange]:
        """What was changed in the job file since the job began, oldest first."""
        return [
            RecordedChange(
                row["round"],
                row["setting"],
                msgspec.json.decode(row["before"]),
                msgspec.json.decode(row["now"]),
                row["accepted"],
                row["at"],
            )
            for row in self._database.rows(sa.select(changes).order_by(changes.c.id))
        ]

    def prepared(self) -> Prepared | None:
        """What was recorded; None if nothing was, or by a version that knew no graphs, or if the graph's file is not
        the recorded one: it can be found out again."""
        text = self._job()["prepared"]
        try:
            found = msgspec.json.decode(text, type=Prepared) if text else None
        except NOT_JSON:
            return None
        if found is None or not self.files.storage.holds(GRAPH, found.graph_bytes):
            return None
        try:
            self.files.storage.fetch(GRAPH, found.graph_digest)
        except UnavailableError:
            raise
        except StateError:
            return None
        return found

    def record_prepared(self, prepared: Prepared) -> None:
        """Records what was found out about the model. The graph lies in its place."""
        self.files.storage.keep(GRAPH)
        self._database.write(job.update().values(prepared=to_json(prepared)))

    def statistics(self) -> Statistics | None:
        """What devices have in the columns of the job's table; None if they were not asked yet.

        Raises:
            StateError: the record is damaged.
        """
        text = self._job()["statistics"]
        try:
            return msgspec.json.decode(text, type=Statistics) if text else None
        except NOT_JSON as error:
            raise StateError(f"{self.directory}: the statistics of the job's columns are damaged: {error}") from None

    def record_statistics(self, found: Statistics) -> None:
        """Records them for good: every model of the job is trained on numbers that are scaled by them."""
        self._database.write(job.update().values(statistics=to_json(found)))

    def backup(self, target: Path) -> Backup:
        """Copies what the job needs to go on to an empty folder, also while a coordinator runs.

        The record is in the copy unless it lies in PostgreSQL.

        Raises:
            StateError: the folder is not empty or lies within the state directory, or a file is damaged.
        """
        self._job()
        if Path(os.path.realpath(target)).is_relative_to(self.directory):
            raise StateError(
                f"{printable(str(target))} lies in {printable(str(self.directory))}, which it is to be a copy of; name "
                "a folder elsewhere"
            )
        return back_up(self._database, self.files, target)

    def _job(self) -> dict[str, Any]:
        row = self._database.row(sa.select(job))
        if row is None:
            raise StateError(f"{self.directory} holds no job yet; start the coordinator on it first")
        return row


def _known_settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of an earlier version tells of the settings of its job."""
    known = {f"model.{field}": value for field, value in msgspec.json.decode(row["model"]).items()}
    known["training.heads"] = Heads.SHARED.value  # there were no others
    try:
        training = msgspec.json.decode(row["prepared"])["training"] if row["prepared"] else {}
    except (*NOT_JSON, KeyError, TypeError):
        training = {}
    if not isinstance(training, dict):
        training = {}
    seed = training.pop("seed", None)
    if seed is not None:
        known["job.seed"] = seed - 1  # what is recorded is that of the first round
    return known | {f"training.{field}": value for field, value in training.items()}


def _storage(directory: Path, url: str) -> Storage:
    if not url:
        return Directory(directory)
    try:
        from coordinator.store.bucket import Bucket  # fsspec: only where a bucket is used
    except ModuleNotFoundError as error:
        raise StateError(f"--files needs {error.name}, which is not installed: pip install 'fedepth[s3]'") from None
    return Bucket(directory, url)
