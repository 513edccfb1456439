"""Compares the record of a job with its files when it is opened, before anything is changed.

Where they disagree, one of them is lost, stale or of another job: the state is refused, and the message says what lies
where and what can be done. Nothing is repaired by guessing.
"""

from __future__ import annotations

import msgspec
import sqlalchemy as sa
import structlog

from coordinator.store.database import HOW_TO_RESTORE, Database
from coordinator.store.entries import RoundRecord, round_from
from coordinator.store.files import Files, WeightsFile, first_weights_name, part_name, weights_name
from coordinator.store.retention import names_of
from coordinator.store.round_store import named
from coordinator.store.tables import dropping, rounds, sealing, tasks, updates
from fedepth.errors import StateError
from fedepth.task import Result

_log = structlog.get_logger()


def compare(database: Database, files: Files) -> None:
    """Whether record and files fit together.

    Raises:
        StateError: there are weights or parts that the record does not know, or parts of recorded updates are missing.
    """
    latest = database.row(sa.select(rounds).where(~rounds.c.superseded).order_by(rounds.c.round.desc()))
    last = None if latest is None else int(latest["round"])
    _rename_first_names(database, files)
    foreign = _foreign_weights(database, files)
    if foreign:
        raise StateError(_foreign_message(database, files, foreign, last))
    unknown = _unknown_spools(database, files)
    if unknown:
        raise StateError(
            f"{files.path('spool')} holds parts of updates of {len(unknown)} tasks that {database.label} does not "
            f"know, such as {unknown[0]}: the record is empty or older than they are; {HOW_TO_RESTORE}; or give the "
            "--database that it was given before; or move these folders away to go on without them"
        )
    if latest is None or _holds_in_force(database, files, latest["digest"]):  # else there is worse to tell
        _check_parts(database, files, -1 if last is None else last)


def note_missing(database: Database, files: Files, in_force: RoundRecord) -> None:
    """Records which weights of past rounds somebody has taken away: they can be neither exported nor gone back to."""
    present = {found.name for found in files.weights_found()}
    kept = rounds.c.kept & rounds.c.published & (rounds.c.digest != in_force.digest)
    missing = [
        row
        for row in database.rows(sa.select(rounds).where(kept).order_by(rounds.c.round))
        if weights_name(row["round"], row["digest"]) not in present
    ]
    for row in missing:
        database.write(rounds.update().where(rounds.c.id == row["id"]).values(kept=False))
    if missing:
        _log.warning("weights of past rounds are missing", rounds=named(row["round"] for row in missing))


def _rename_first_names(database: Database, files: Files) -> None:
    """Versions without revisions named weights by their round alone."""
    for found in files.weights_found():
        if found.name != first_weights_name(found.round):
            continue
        here = (rounds.c.round == found.round) & rounds.c.published & rounds.c.kept & ~rounds.c.superseded
        row = database.row(sa.select(rounds).where(here))
        if row is not None and files.path(found.name).stat().st_size == row["size_bytes"]:
            files.storage.rename(found.name, weights_name(row["round"], row["digest"]))


def _foreign_weights(database: Database, files: Files) -> list[WeightsFile]:
    found = files.weights_found()
    known = {row["name"] for row in database.rows(sa.select(dropping))}
    known |= {weights_name(row["round"], row["digest"]) for row in database.rows(sa.select(sealing))}
    foreign = []
    for file in found:
        if file.name not in known:
            of_round = database.rows(sa.select(rounds).where(rounds.c.round == file.round))
            if not any(file.name in names_of(round_from(row)) for row in of_round):
                foreign.append(file)
    return foreign


def _holds_in_force(database: Database, files: Files, digest: str) -> bool:
    of_round = rounds.c.published & ~rounds.c.superseded & (rounds.c.digest == digest)
    return any(
        files.storage.holds(weights_name(row["round"], digest), row["size_bytes"])
        for row in database.rows(sa.select(rounds).where(of_round))
    )


def _foreign_message(database: Database, files: Files, foreign: list[WeightsFile], last: int | None) -> str:
    state = "holds no round" if last is None else f"ends with round {last}"
    numbers = named(sorted({file.round for file in foreign}))
    return (
        f"{files.path('weights')} holds weights of {numbers} that {database.label} does not know ({foreign[0].name} "
        f"is one of {len(foreign)}); the record {state}: it is lost, or older than the files, or of another job; "
        f"{HOW_TO_RESTORE}; or give the --database that it was given before; or move these files away"
    )


def _unknown_spools(database: Database, files: Files) -> list[str]:
    known = {row["name"] for row in database.rows(sa.select(dropping))}
    unknown = []
    for task_id, folders in sorted(files.spooled_tasks().items()):
        of_task = sa.select(tasks.c.task_id).where(tasks.c.task_id == task_id)
        if not folders <= known and database.row(of_task) is None:
            unknown.append(task_id)
    return unknown


def waiting_updates(database: Database, last: int) -> list[Result]:
    """The recorded updates of rounds after the last one."""
    rows = database.rows(sa.select(updates.c.result).where(updates.c.round > last).order_by(updates.c.task_id))
    return [msgspec.json.decode(row["result"], type=Result) for row in rows]


def _check_parts(database: Database, files: Files, last: int) -> None:
    for result in waiting_updates(database, last):
        for part in result.parts:
            name = part_name(result.task_id, result.attempt, part.part)
            if not files.storage.holds(name, part.size_bytes):
                raise StateError(
                    f"an update of task {result.task_id} is recorded for round {result.round}, but {files.path(name)} "
                    f"is not here with its {part.size_bytes} bytes; restore it, or all of a backup made by "
                    f"fedepth-coordinator backup, or do without the open round: fedepth-coordinator rollback "
                    f"--round {last}"
                )
