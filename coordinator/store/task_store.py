"""Devices, tasks, updates and failures in the record.

An update that is recorded is part of its round for good: it is what accepts a task, whatever else is said of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from coordinator.store.database import Database
from coordinator.store.entries import REASONS, EndedTask, FailureKind, TaskRecord, finite, task_from, to_json
from coordinator.store.files import Files, part_name
from coordinator.store.tables import devices, failures, tasks, updates
from fedepth.aggregation.rules import Norms
from fedepth.errors import StateError
from fedepth.task import DeviceReport, Result

MAX_DEVICES = 10_000
FORGET_S = 90 * 24 * 3600.0  # a device that was not seen for this long makes room for another

_MESSAGE_CHARACTERS = 2000
_ID_CHARACTERS = 200


class TaskStore:
    """The part of a `Store` that is about devices and what they do."""

    files: Files
    _database: Database

    # --- devices

    def see_device(self, report: DeviceReport, most: int = MAX_DEVICES) -> bool:
        """Takes note of a device. False if it is new and `most` are known already."""
        now = time.time()
        known = {"name": report.name, "report": to_json(report), "last_seen": now}
        with self._database.begin() as connection:
            this = devices.c.device_id == report.device_id
            if connection.execute(devices.update().where(this).values(known)).rowcount:
                return True
            if _count(connection) >= most:
                connection.execute(devices.delete().where(devices.c.last_seen < now - FORGET_S))
                if _count(connection) >= most:
                    return False
            connection.execute(devices.insert().values(device_id=report.device_id, first_seen=now, **known))
        return True

    def device_name(self, device_id: str) -> str:
        """What a device is called, or its id if it is not known."""
        row = self._database.row(sa.select(devices.c.name).where(devices.c.device_id == device_id))
        return device_id if row is None else str(row["name"])

    def device_names(self) -> dict[str, str]:
        """What all devices are called, by their ids."""
        query = sa.select(devices.c.device_id, devices.c.name)
        return {row["device_id"]: row["name"] for row in self._database.rows(query)}

    # --- tasks

    def record_task(self, record: TaskRecord) -> None:
        """Records a task as it is handed out.

        Raises:
            StateError: it has an update already.
        """
        self.record_step([record], ())

    def record_step(self, given: Sequence[TaskRecord], ended: Sequence[EndedTask]) -> None:
        """Records all that one event changes, or nothing of it: tasks that ended, then tasks that were handed out.

        Repeating it changes nothing.

        Raises:
            StateError: one of the tasks has an update or was given to another device, or one that ended is not known.
        """
        if not given and not ended:
            return
        with self._database.begin() as connection:
            named = [task.task_id for task in given] + [task.task_id for task in ended]
            before = {row["task_id"]: row for row in connection.execute(_tasks_with(named)).mappings()}
            accepted = [task_id for task_id, row in before.items() if row["accepted"] is not None]
            if accepted:
                raise StateError(f"task {accepted[0]} has an update and cannot change any more")
            again = {task.task_id: task.attempt for task in given}
            for end in ended:
                row = before.get(end.task_id)
                if row is None:
                    raise StateError(f"task {end.task_id} is said to be {end.status}, but was never handed out")
                if row["attempt"] != again.get(end.task_id) and row["status"] != end.status:
                    change = tasks.update().where(tasks.c.task_id == end.task_id)
                    connection.execute(change.values(status=end.status))
                    _count_failure(connection, end.status, end.reason, end.message, end.task_id)
            for record in given:
                _hand_out(connection, record, before.get(record.task_id))

    def task(self, task_id: str) -> TaskRecord | None:
        row = self._database.row(_tasks_with([task_id]))
        return None if row is None else task_from(row)

    def tasks_of(self, round_number: int) -> list[TaskRecord]:
        """In the order of their ids."""
        query = _tasks().where(tasks.c.round == round_number).order_by(tasks.c.task_id)
        return [task_from(row) for row in self._database.rows(query)]

    # --- updates

    def keep_parts(self, result: Result) -> None:
        """Makes the parts of an update durable where the job's files are kept; before `record_update`. It hashes them,
        and with a bucket it takes long.

        Raises:
            StateError: a part is not here.
        """
        for name in self._parts_here(result):
            self.files.storage.keep(name)

    def _parts_here(self, result: Result) -> list[str]:
        names = [part_name(result.task_id, result.attempt, part.part) for part in result.parts]
        for name, part in zip(names, result.parts, strict=True):
            path = self.files.path(name)
            if not path.is_file() or path.stat().st_size != part.size_bytes:
                raise StateError(f"{path} is not here with its {part.size_bytes} bytes; the device must send it again")
        return names

    def fetch_parts(self, result: Result) -> None:
        """Sees that the parts of a recorded update are what was accepted, by their hashes, from a bucket if need be.

        Raises:
            StateError: one is damaged or missing, and there is no other copy.
        """
        for part in result.parts:
            self.files.storage.fetch(part_name(result.task_id, result.attempt, part.part), part.digest)

    def record_update(self, result: Result, norms: Norms | None) -> None:
        """Accepts an update for good: after this it is part of its round. Its parts are kept (`keep_parts`).

        Recording the same update again changes nothing.

        Raises:
            StateError: another update of the task or of its device is recorded, or a part is not here.
        """
        if self.update(result.task_id) is None:
            self._parts_here(result)
        values = {
            "task_id": result.task_id,
            "round": result.round,
            "device_id": result.device_id,
            "result": to_json(result),
            "size_bytes": sum(part.size_bytes for part in result.parts),
            "received_at": time.time(),
            "norm": None if norms is None else finite(norms.parameters),
            "buffer_norm": None if norms is None else finite(norms.buffers),
        }
        with self._database.begin() as connection:
            of_task = updates.c.task_id == result.task_id
            of_device = (updates.c.round == result.round) & (updates.c.device_id == result.device_id)
            found = connection.execute(sa.select(updates).where(of_task | of_device)).mappings().first()
            if found is None:
                connection.execute(updates.insert().values(values))
            elif (found["task_id"], found["result"]) != (result.task_id, values["result"]):
                raise StateError(
                    f"an update of task {found['task_id']} from {found['device_id']} in round {found['round']} is "
                    f"recorded, and the one of task {result.task_id} is another"
                )

    def update(self, task_id: str) -> Result | None:
        row = self._database.row(sa.select(updates.c.result).where(updates.c.task_id == task_id))
        return None if row is None else msgspec.json.decode(row["result"], type=Result)

    def updates_of(self, round_number: int) -> list[Result]:
        """In the order of their task ids, whenever they came."""
        query = sa.select(updates.c.result).where(updates.c.round == round_number).order_by(updates.c.task_id)
        return [msgspec.json.decode(row["result"], type=Result) for row in self._database.rows(query)]

    def updates(self) -> list[Result]:
        """Those of all rounds whose updates are still in the record, by round and task id."""
        query = sa.select(updates.c.result).order_by(updates.c.round, updates.c.task_id)
        return [msgspec.json.decode(row["result"], type=Result) for row in self._database.rows(query)]

    def accepted_ids(self, round_number: int) -> frozenset[str]:
        """The tasks of this round that have an update."""
        query = sa.select(updates.c.task_id).where(updates.c.round == round_number)
        return frozenset(row["task_id"] for row in self._database.rows(query))

    def norms_of(self, round_number: int) -> list[Norms]:
        """How far this round's updates went, as far as it is known, in the order of their task ids."""
        query = sa.select(updates.c.norm, updates.c.buffer_norm).where(
            (updates.c.round == round_number) & updates.c.norm.is_not(None) & updates.c.buffer_norm.is_not(None)
        )
        rows = self._database.rows(query.order_by(updates.c.task_id))
        return [Norms(row["norm"], row["buffer_norm"]) for row in rows]

    # --- failures

    def count_refusal(self, reason: str, message: str, task_id: str) -> None:
        """Counts a refusal that ends no task: a late update, or one that came from another device."""
        with self._database.begin() as connection:
            _count_failure(connection, "refused", reason, message, task_id)

    def failure_counts(self) -> dict[str, int]:
        """How often each "status/reason" happened."""
        return {f"{kind.status}/{kind.reason}": kind.times for kind in self.failures()}

    def failures(self) -> list[FailureKind]:
        """Every kind of failure that happened, with the last of its kind."""
        query = sa.select(failures).order_by(failures.c.status, failures.c.reason)
        return [FailureKind(**row) for row in self._database.rows(query)]


def _tasks() -> sa.Select[Any]:
    accepted = updates.c.task_id.label("accepted")
    return sa.select(tasks, accepted).outerjoin(updates, updates.c.task_id == tasks.c.task_id)


def _tasks_with(task_ids: Sequence[str]) -> sa.Select[Any]:
    return _tasks().where(tasks.c.task_id.in_(task_ids))


def _hand_out(connection: sa.Connection, record: TaskRecord, before: sa.RowMapping | None) -> None:
    if before is not None and before["device_id"] != record.device_id:
        raise StateError(f"task {record.task_id} was given to {before['device_id']}, and not to {record.device_id}")
    values = {"attempt": record.attempt, "status": record.status, "plan": to_json(record.plan)}
    values["sample_count"] = record.sample_count
    if before is not None and all(before[key] == value for key, value in values.items()):
        return
    values["given_at"] = time.time()
    if before is not None:
        connection.execute(tasks.update().where(tasks.c.task_id == record.task_id).values(values))
        return
    new = {"task_id": record.task_id, "round": record.round, "device_id": record.device_id}
    connection.execute(tasks.insert().values(**new, **values))


def _count_failure(connection: sa.Connection, status: str, reason: str, message: str, task_id: str) -> None:
    kind = {"status": status, "reason": reason if reason in REASONS else "other"}
    last = {"message": message[:_MESSAGE_CHARACTERS], "task_id": task_id[:_ID_CHARACTERS], "at": time.time()}
    this = (failures.c.status == kind["status"]) & (failures.c.reason == kind["reason"])
    if not connection.execute(failures.update().where(this).values(times=failures.c.times + 1, **last)).rowcount:
        connection.execute(failures.insert().values(times=1, **kind, **last))


def _count(connection: sa.Connection) -> int:
    return connection.execute(sa.select(sa.func.count()).select_from(devices)).scalar_one()
