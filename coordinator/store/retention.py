"""Which rounds keep their weights, and how files go: what goes is recorded before it is deleted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sqlalchemy as sa

from coordinator.store.database import Database
from coordinator.store.entries import RoundRecord
from coordinator.store.files import Files, aside_name, export_name, weights_name
from coordinator.store.tables import dropping, rounds, tasks
from fedepth.errors import UnavailableError
from fedepth.job_sections import RetentionSection

_AT_ONCE = 500  # rows in one statement
_MOST_TROUBLE = 8


def staying(records: Sequence[RoundRecord], retention: RetentionSection) -> list[RoundRecord]:
    """Those of `records` that keep their weights and exports.

    Of the rounds in force these are the last `keep_last`, the one with the highest accuracy (of several the
    first), and every `keep_every`-th. Of the averages that were kept aside, and of the rounds that a rollback took
    back, the last `keep_last` each: someone may want to look at them.
    """
    ordered = sorted(records, key=lambda each: (each.round, each.closed_at))
    last = retention.keep_last
    superseded = [each for each in ordered if each.superseded]
    aside = [each for each in ordered if not each.superseded and not each.published]
    in_force = [each for each in ordered if not each.superseded and each.published]
    stays = [*superseded[-last:], *aside[-last:], *in_force[-last:]]
    evaluated = [each for each in in_force if each.accuracy is not None]
    if retention.keep_best and evaluated:
        stays.append(max(evaluated, key=lambda each: each.accuracy or 0.0))
    if retention.keep_every:
        stays += [each for each in in_force if each.round and each.round % retention.keep_every == 0]
    return [each for each in ordered if any(each is stay for stay in stays)]


def names_of(record: RoundRecord) -> set[str]:
    """The names of the files that a round alone holds."""
    names = set()
    if record.published:
        names.add(weights_name(record.round, record.digest))
    if record.aside_digest:
        # Both: a crash may come between the record and the new name.
        names |= {weights_name(record.round, record.aside_digest), aside_name(record.round, record.aside_digest)}
    if record.export_path:
        names.add(export_name(record.export_path))
    return names


def drop(connection: sa.Connection, names: Iterable[str]) -> None:
    """Records that these files go; `finish_drops` deletes them once the transaction has ended."""
    wanted = sorted(set(names))
    for start in range(0, len(wanted), _AT_ONCE):
        some = wanted[start : start + _AT_ONCE]
        held = connection.execute(sa.select(dropping.c.name).where(dropping.c.name.in_(some))).scalars().all()
        new = [{"name": name} for name in some if name not in held]
        if new:
            connection.execute(dropping.insert(), new)


def forget(connection: sa.Connection, ids: Iterable[int]) -> None:
    """Records that the files of these rounds are kept no longer."""
    wanted = sorted(ids)
    for start in range(0, len(wanted), _AT_ONCE):
        some = rounds.c.id.in_(wanted[start : start + _AT_ONCE])
        connection.execute(rounds.update().where(some).values(kept=False, export_path=""))


def finish_drops(database: Database, files: Files) -> None:
    """Deletes the files that are recorded as going, now or after a crash. One that cannot be deleted keeps none of the
    others.

    Raises:
        UnavailableError: the first that could not be deleted; it stays recorded.
    """
    after, trouble = "", _Trouble()
    while rows := database.rows(
        sa.select(dropping).where(dropping.c.name > after).order_by(dropping.c.name).limit(_AT_ONCE)
    ):
        after = rows[-1]["name"]
        gone = [row["name"] for row in rows if trouble.removed(files, [row["name"]])]
        if gone:
            database.write(dropping.delete().where(dropping.c.name.in_(gone)))
    trouble.tell()


class _Trouble:
    """Files that could not be deleted; of more than a few the storage itself is to blame, and no more is tried."""

    def __init__(self) -> None:
        self._found: list[UnavailableError] = []

    def removed(self, files: Files, names: Iterable[str]) -> bool:
        if len(self._found) >= _MOST_TROUBLE:
            return False
        try:
            files.remove_all(names)
        except UnavailableError as error:
            self._found.append(error)
            return False
        return True

    def tell(self) -> None:
        if self._found:
            raise self._found[0]


def drop_spools_before(database: Database, files: Files, round_number: int) -> None:
    """Deletes the spools of tasks of rounds before this one. What is of no known task stays.

    Raises:
        UnavailableError: the first that could not be deleted.
    """
    trouble = _Trouble()
    spools = files.spooled_tasks()
    wanted = sorted(spools)
    for start in range(0, len(wanted), _AT_ONCE):
        past = tasks.c.task_id.in_(wanted[start : start + _AT_ONCE]) & (tasks.c.round < round_number)
        for row in database.rows(sa.select(tasks.c.task_id).where(past)):
            trouble.removed(files, spools[row["task_id"]])
    trouble.tell()
