"""A copy of a job's state that can be served alone, made while the coordinator runs, from any process.

The record comes first, as it is at one moment, then the files that it needs to go on. If the job lets go of one of them
meanwhile, because its round has closed, the copy begins again.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec
import sqlalchemy as sa

from coordinator.store.comparison import waiting_updates
from coordinator.store.database import Database
from coordinator.store.entries import Prepared, round_from
from coordinator.store.files import GRAPH, Files, part_name, weights_name
from coordinator.store.round_store import new_run_id
from coordinator.store.tables import dropping, job, rounds, sealing
from fedepth.errors import StateError, UnavailableError
from fedepth.files import NOT_JSON, disk_errors, file_digest, make_durable
from fedepth.printable import printable

_TRIES = 5
_STAGING = "unfinished"  # the record lies here until all that it names is copied


@dataclass(frozen=True)
class Backup:
    """What a backup holds.

    Attributes:
        round: the last round; -1 if there is none.
        updates: so many updates that wait for their average.
        size_bytes: of the files beside the record.
        has_record: False if the record lies in PostgreSQL, which has tools of its own.
    """

    job: str
    round: int
    updates: int
    size_bytes: int
    has_record: bool


def back_up(database: Database, files: Files, target: Path) -> Backup:
    """Copies what the job needs to go on to `target`.

    Raises:
        StateError: the target is not empty, or a file is damaged.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StateError(f"{printable(str(target))} exists and is not an empty folder; name another one")
    was_there = target.exists()
    for _ in range(_TRIES):
        try:
            with disk_errors("the backup cannot be written", target):
                target.mkdir(parents=True, exist_ok=True)
                return _copy(database, files, target)
        except _GoneError as error:
            reason = str(error)
            _clear(target, was_there)
        except BaseException:
            _clear(target, was_there)  # so that the same folder can be named again
            raise
    raise StateError(f"{reason}; the same happened {_TRIES} times: see whether the state is damaged, and try again")


def _clear(target: Path, was_there: bool) -> None:
    """Deletes what was copied so far."""
    shutil.rmtree(target, ignore_errors=True)
    if was_there:
        with contextlib.suppress(OSError):
            target.mkdir(parents=True, exist_ok=True)


class _GoneError(Exception):
    """A file that the record names is not there any more."""


def _copy(database: Database, files: Files, target: Path) -> Backup:
    record = _copy_record(database, target) if database.path is not None else database
    try:
        named = _needed(record)
        copied = Files(target)
        copied.create()
        for name, digest in named.items():
            _copy_file(files, name, digest, copied.path(name))
        last = _last(record)
        waiting = len(waiting_updates(record, last))
        job_name = record.rows(sa.select(job.c.name))[0]["name"]
        if record is not database:
            _forget_others(record, set(named))
    finally:
        if record is not database:
            record.close()
    if record is not database:
        assert record.path is not None
        record.path.replace(target / record.path.name)
        shutil.rmtree(target / _STAGING)
    make_durable(target)
    size = sum(copied.path(each).stat().st_size for each in named)
    return Backup(job_name, last, waiting, size, record is not database)


def _last(record: Database) -> int:
    row = record.row(sa.select(rounds.c.round).where(~rounds.c.superseded).order_by(rounds.c.round.desc()))
    return -1 if row is None else int(row["round"])


def _copy_record(database: Database, target: Path) -> Database:
    staging = target / _STAGING
    staging.mkdir()
    copy = Database(staging, "")
    assert copy.path is not None
    database.copy_to(copy.path)
    return copy


def _needed(record: Database) -> dict[str, str]:
    """The names and digests of the files without which the job cannot go on."""
    named = {}
    in_force = sa.select(rounds).where(~rounds.c.superseded & rounds.c.published).order_by(rounds.c.round.desc())
    row = record.row(in_force)
    if row is not None:
        named[weights_name(row["round"], row["digest"])] = str(row["digest"])
    for result in waiting_updates(record, _last(record)):
        for part in result.parts:
            named[part_name(result.task_id, result.attempt, part.part)] = part.digest
    for row in record.rows(sa.select(job.c.prepared)):
        try:
            prepared = msgspec.json.decode(row["prepared"], type=Prepared)
        except NOT_JSON:  # nothing is, or by an earlier version: it is made again
            continue
        named[GRAPH] = prepared.graph_digest
    return named


def _copy_file(files: Files, name: str, digest: str, target: Path) -> None:
    try:
        files.storage.fetch(name, digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files.path(name), target)
    except UnavailableError:
        raise
    except (StateError, FileNotFoundError) as error:
        raise _GoneError(str(error)) from error
    if file_digest(target) != digest:
        raise _GoneError(f"{files.path(name)} changed while it was copied")
    make_durable(target)


def _forget_others(record: Database, held: set[str]) -> None:
    """The copy's record says what the copy holds, and names its run anew: what it hands out is no task of the original,
    though both go on from the same round."""
    with record.begin() as connection:
        connection.execute(job.update().values(run_id=new_run_id()))
        for row in connection.execute(sa.select(rounds).where(rounds.c.kept)).mappings().all():
            done = round_from(row)
            if weights_name(done.round, done.digest) not in held or not done.published:
                connection.execute(rounds.update().where(rounds.c.id == row["id"]).values(kept=False))
        # An average that was not published, and exports, stay where they are.
        connection.execute(rounds.update().values(export_path="", aside_digest=""))
        connection.execute(sealing.delete())
        connection.execute(dropping.delete())
    record.checkpoint()
