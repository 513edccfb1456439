"""Rounds and their weights in the record.

New weights get their name in three steps: the intent is recorded, the file gets its name, the round is recorded. So
a file among the weights that the record does not know is the one of the intent, or somebody else's.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from coordinator.store.database import Database
from coordinator.store.entries import RoundRecord, Sealed, Summary, finite, round_from, round_row
from coordinator.store.files import LABELS, Files, aside_name, weights_name
from coordinator.store.retention import drop, drop_spools_before, finish_drops, forget, names_of, staying
from coordinator.store.tables import dropping, job, rounds, sealing, tasks, updates
from fedepth.errors import StateError, UnavailableError
from fedepth.files import disk_errors, file_digest
from fedepth.job_sections import RetentionSection

MOST_ROUNDS = 10_000  # that one query lists

_SHOWN = 12  # rounds that a message names


class RoundStore:
    """The part of a `Store` that is about rounds and weights."""

    directory: Path
    files: Files
    _database: Database

    # --- new weights

    def seal_weights(self, partial: Path, round_number: int, digest: str | None = None) -> Sealed:
        """Gives new weights their name and makes them durable, by a hash; `record_round` is next.

        `digest`: their sha256 (hex), where whoever has written them just now knows it.

        Sealing the same weights again changes nothing. Other weights take the place of those that were sealed for
        a round that was never recorded.

        Raises:
            StateError: this round is recorded with other weights, or a file of this name holds other bytes.
        """
        with disk_errors("new weights cannot be read", partial):
            digest, size = digest or file_digest(partial), partial.stat().st_size
        name = weights_name(round_number, digest)
        with self._database.begin() as connection:
            done = _in_force(connection, rounds.c.round == round_number)
            if done is not None and not (done.published and done.digest == digest):
                raise StateError(
                    f"round {round_number} is recorded with weights {done.digest[:12]}…, {partial.name} holds "
                    f"{digest[:12]}…; roll back to a round before it to train it again"
                )
            if done is None:
                self._intend(connection, Sealed(round_number, digest, size, self.files.path(name)))
            connection.execute(dropping.delete().where(dropping.c.name == name))
        self._drop_what_can_go()
        self.files.place(partial, name, digest)
        return Sealed(round_number, digest, size, self.files.path(name))

    def _intend(self, connection: sa.Connection, sealed: Sealed) -> None:
        before = _intent(connection)
        if before is not None and (before.round, before.digest) != (sealed.round, sealed.digest):
            _drop_unless_known(connection, weights_name(before.round, before.digest), before.round)
        connection.execute(sealing.delete())
        values = {"round": sealed.round, "digest": sealed.digest, "size_bytes": sealed.size_bytes}
        connection.execute(sealing.insert().values(id=1, **values))

    def record_round(self, record: RoundRecord) -> None:
        """Records a round whose weights are sealed; from now on they are in force, if they are published.

        Recording the same round again changes nothing.

        Raises:
            StateError: its weights are not sealed, another record of the round exists, or it is not published and
                names other weights than those in force.
        """
        with self._database.begin() as connection:
            done = _in_force(connection, rounds.c.round == record.round)
            if done is None:
                self._add(connection, record)
            elif any(getattr(done, name) != getattr(record, name) for name in ("digest", "published", "aside_digest")):
                raise StateError(f"round {record.round} is recorded with weights {done.digest[:12]}… already")
        if record.aside_digest:
            self._move_aside(record)
        self._drop_what_can_go()
        self._database.checkpoint()

    def _add(self, connection: sa.Connection, record: RoundRecord) -> None:
        intent = _intent(connection)
        sealed = "" if intent is None or intent.round != record.round else intent.digest
        if record.published:
            if sealed != record.digest:
                raise StateError(f"the weights {record.digest[:12]}… of round {record.round} are not sealed")
        else:
            before = _in_force(connection, sa.true())
            if before is None or before.digest != record.digest:
                raise StateError(
                    f"round {record.round} is not published, and {record.digest[:12]}… are not the weights in force"
                )
            if record.aside_digest not in ("", sealed):
                raise StateError(f"the average {record.aside_digest[:12]}… of round {record.round} is not sealed")
            if sealed and not record.aside_digest:
                _drop_unless_known(connection, weights_name(record.round, sealed), record.round)
        connection.execute(rounds.insert().values(round_row(record)))
        connection.execute(sealing.delete())

    def _drop_what_can_go(self) -> None:
        # A round must not wait for an old file that cannot be deleted: it stays recorded as going, and `prune`, which
        # follows every round, tells of it.
        with contextlib.suppress(UnavailableError, OSError):
            finish_drops(self._database, self.files)

    def _move_aside(self, record: RoundRecord) -> None:
        name, aside = weights_name(record.round, record.aside_digest), aside_name(record.round, record.aside_digest)
        if any(found.name == aside for found in self.files.weights_found()):
            # Moved already; or a round that a rollback took back has kept the very same average, and one copy will do.
            self.files.storage.remove(name)
        else:
            self.files.storage.rename(name, aside)

    # --- rounds

    def latest_round(self) -> RoundRecord | None:
        """The last round in force, published or not; its digest is that of the weights in force."""
        query = sa.select(rounds).where(~rounds.c.superseded).order_by(rounds.c.round.desc())
        row = self._database.row(query)
        return None if row is None else round_from(row)

    def rounds(self, most: int = MOST_ROUNDS) -> list[RoundRecord]:
        """The last rounds in force, at most so many, in their order."""
        query = sa.select(rounds).where(~rounds.c.superseded).order_by(rounds.c.round.desc()).limit(most)
        return [round_from(row) for row in reversed(self._database.rows(query))]

    def superseded_rounds(self, most: int = MOST_ROUNDS) -> list[RoundRecord]:
        """The last rounds that a rollback took back, at most so many, in the order in which they were recorded."""
        query = sa.select(rounds).where(rounds.c.superseded).order_by(rounds.c.id.desc()).limit(most)
        return [round_from(row) for row in reversed(self._database.rows(query))]

    def kept_rounds(self) -> list[RoundRecord]:
        """The published rounds in force whose weights are here."""
        query = sa.select(rounds).where(_here()).order_by(rounds.c.round)
        return [round_from(row) for row in self._database.rows(query)]

    def whole_rounds(self) -> list[RoundRecord]:
        """Those of `kept_rounds` that a rollback can go back to: their files are there, and those here are hashed."""
        return [each for each in self.kept_rounds() if self._is_whole(each)]

    def _is_whole(self, record: RoundRecord) -> bool:
        name = weights_name(record.round, record.digest)
        path = self.files.path(name)
        try:
            if path.is_file() and file_digest(path) == record.digest:
                return True
            return not path.is_file() and self.files.storage.holds(name, record.size_bytes)
        except (OSError, UnavailableError):
            return False  # what cannot be read now is not offered

    def kept_round(self, round_number: int) -> RoundRecord:
        """A published round in force whose weights are here.

        Raises:
            StateError: there is none of this number. The message says which there are.
        """
        row = self._database.row(sa.select(rounds).where(_here() & (rounds.c.round == round_number)))
        if row is not None:
            return round_from(row)
        done = self._database.rows(sa.select(rounds).where(rounds.c.round == round_number).order_by(rounds.c.id.desc()))
        raise StateError(
            f"{_why_not(round_number, done)}; {self.directory} has the weights of "
            f"{named(each.round for each in self.whole_rounds())}"
        )

    def find_weights(self, digest: str) -> RoundRecord | None:
        """The last published round in force with these weights, if they are still here."""
        query = sa.select(rounds).where(_here() & (rounds.c.digest == digest)).order_by(rounds.c.round.desc())
        row = self._database.row(query)
        return None if row is None else round_from(row)

    def weights_of(self, record: RoundRecord) -> Path:
        """Where the weights lie that are in force after this round; they are hashed, and fetched if need be.

        Raises:
            StateError: they are not kept any more, missing, or damaged.
        """
        found = self.find_weights(record.digest)
        if found is None:
            self.kept_round(record.round)
            raise StateError(f"{self.directory} has no weights {record.digest[:12]}… of round {record.round}")
        self.files.storage.fetch(weights_name(found.round, found.digest), found.digest)
        return self.files.weights(found.round, found.digest)

    def weights_in_force(self) -> Path:
        """Where the weights in force lie; they are hashed, and fetched if need be.

        Raises:
            StateError: there are none yet, or they are missing or damaged. The message says how to go on.
        """
        record = self.latest_round()
        if record is None:
            raise StateError(f"{self.directory} has no weights to begin with")
        try:
            return self.weights_of(record)
        except UnavailableError:
            raise
        except StateError as error:
            others = [each.round for each in self.whole_rounds() if each.digest != record.digest]
            back = f", or go back with fedepth-coordinator rollback --round N to {named(others)}" if others else ""
            raise StateError(
                f"{error}, and they are the weights in force after round {record.round}; restore this file, or all of "
                f"a backup made by fedepth-coordinator backup{back}"
            ) from None

    def summary(self) -> Summary:
        """The latest that is known of the job."""
        latest = [
            self._database.row(
                sa.select(column.label("value")).where(~rounds.c.superseded & known).order_by(rounds.c.round.desc())
            )
            for column, known in (
                (rounds.c.accuracy, rounds.c.accuracy.is_not(None) & rounds.c.published),
                (rounds.c.export_path, rounds.c.export_path != ""),
            )
        ]
        accuracy, export_path = (None if row is None else row["value"] for row in latest)
        last = self._database.row(sa.select(rounds).order_by(rounds.c.id.desc()))  # also one that was taken back
        epsilon, delta = (None, None) if last is None else (last["epsilon"], last["delta"])
        count = sa.select(sa.func.count().label("value")).where(~rounds.c.superseded & ~rounds.c.published)
        unpublished = self._database.rows(count)[0]["value"]
        return Summary(accuracy, export_path or "", epsilon, delta, self.not_private(), unpublished)

    def noise_multipliers(self) -> list[float | None]:
        """Of every round that was ever closed, with those that a rollback took back, in their order; 0 for no noise,
        None where it is not known."""
        query = sa.select(rounds.c.noise_multiplier).where(rounds.c.round > 0).order_by(rounds.c.id)
        return [row["noise_multiplier"] for row in self._database.rows(query)]

    def not_private(self) -> str:
        """Why there is no bound on what all rounds have spent though noise was added; "" if there is one, or none was.

        A round that was taken back counts: its average was made, and whoever asked could have it.
        """
        without, unknown = (
            [row["round"] for row in self._database.rows(_rounds_with(noise))]
            for noise in (rounds.c.noise_multiplier == 0, rounds.c.noise_multiplier.is_(None))
        )
        noisy = rounds.c.noise_multiplier.is_(None) | (rounds.c.noise_multiplier > 0)
        if not (without or unknown) or self._database.row(_rounds_with(noisy)) is None:
            return ""
        if without:
            return f"not private: {in_spans(without)} {_were(without)} closed without noise"
        return f"epsilon is not known: {in_spans(unknown)} {_were(unknown)} closed with noise that is not recorded"

    def set_evaluation(self, round_number: int, accuracy: float | None, loss: float | None) -> None:
        self._set(round_number, accuracy=finite(accuracy), loss=finite(loss))

    def set_export(self, round_number: int, path: str, parity_max_abs: float | None) -> None:
        """Records an ONNX file of a round, which is whole."""
        export = Path(path)
        if export.parent == self.files.path("exports"):
            self.files.storage.keep(f"exports/{export.name}")
            if self.files.path(LABELS).exists():
                self.files.storage.keep(LABELS)
        self._set(round_number, export_path=path, parity_max_abs=finite(parity_max_abs))

    def _set(self, round_number: int, **values: Any) -> None:
        change = rounds.update().where((rounds.c.round == round_number) & ~rounds.c.superseded)
        self._database.write(change.values(**values))

    # --- what goes

    def drop_spools_before(self, round_number: int) -> None:
        """Deletes the spools of tasks of rounds before this one. What is of no known task stays."""
        drop_spools_before(self._database, self.files, round_number)

    def prune(self, retention: RetentionSection) -> None:
        """Lets go of what the job does not keep: spools of closed rounds, weights, exports, tasks and updates.

        May be repeated, and goes on after a crash when the store is opened.
        """
        latest = self.latest_round()
        if latest is None:
            return
        undeleted: UnavailableError | None = None
        try:
            self.drop_spools_before(latest.round + 1)
        except UnavailableError as error:
            undeleted = error
        with self._database.begin() as connection:
            found = connection.execute(sa.select(rounds).where(rounds.c.kept)).mappings().all()
            records = {row["id"]: round_from(row) for row in found}
            stay = staying(list(records.values()), retention)
            going = {number: each for number, each in records.items() if not any(each is one for one in stay)}
            needed = {name for each in stay for name in names_of(each)}
            drop(connection, {name for each in going.values() for name in names_of(each)} - needed)
            forget(connection, going)
            for table in (updates, tasks) if undeleted is None else ():  # which say whose the spools are
                connection.execute(table.delete().where(table.c.round <= latest.round - retention.history))
        finish_drops(self._database, self.files)
        if undeleted is not None:
            raise undeleted

    def rollback(self, round_number: int) -> RoundRecord:
        """Makes an earlier round the last one. The coordinator then trains on from there.

        Later rounds stay in the record as superseded; their tasks and updates, and those of the open round, go. The
        name of the run changes, so that no task of before can be mistaken for one of after.

        Raises:
            StateError: the round is unknown, was not published, or its weights are not here or damaged.
        """
        record = self.kept_round(round_number)
        try:
            self.files.storage.fetch(weights_name(record.round, record.digest), record.digest)
        except UnavailableError:
            raise
        except StateError as error:
            whole = named(each.round for each in self.whole_rounds())
            raise StateError(f"{error}; {self.directory} has the weights of {whole}") from None
        spools = self.files.spooled_tasks()
        with self._database.begin() as connection:
            later = (rounds.c.round > round_number) & ~rounds.c.superseded
            for row in connection.execute(sa.select(rounds).where(later)).mappings():
                # The next round of this number will write its export to the same place.
                drop(connection, names_of(replace(round_from(row), published=False, aside_digest="")))
            connection.execute(rounds.update().where(later).values(superseded=True, export_path=""))
            intent = _intent(connection)
            if intent is not None:
                _drop_unless_known(connection, weights_name(intent.round, intent.digest), intent.round)
            connection.execute(sealing.delete())
            for table in (updates, tasks):
                connection.execute(table.delete().where(table.c.round > round_number))
            drop(connection, {name for names in spools.values() for name in names})
            connection.execute(job.update().values(run_id=new_run_id()))
        finish_drops(self._database, self.files)
        self._database.checkpoint()
        return record


def new_run_id() -> str:
    return uuid.uuid4().hex[:12]


def named(numbers: Iterable[int]) -> str:
    """Rounds for people: "round 3", "rounds 1, 2 and 5", "no round"."""
    listed = [str(number) for number in numbers]
    if len(listed) > _SHOWN:
        listed = [*listed[: _SHOWN // 2], "…", *listed[-_SHOWN // 2 :]]
    if len(listed) < 2:
        return f"round {listed[0]}" if listed else "no round"
    return f"rounds {', '.join(listed[:-1])} and {listed[-1]}"


def in_spans(numbers: Sequence[int]) -> str:
    """Sorted numbers of rounds for people, neighbours in one: "round 3", "rounds 1 to 5 and 7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    texts = [str(first) if first == last else f"{first} to {last}" for first, last in spans]
    if len(texts) > _SHOWN:
        texts = [*texts[: _SHOWN // 2], "…", *texts[-_SHOWN // 2 :]]
    listed = texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
    return f"round{'' if len(numbers) == 1 else 's'} {listed}"


def _were(numbers: Sequence[int]) -> str:
    return "was" if len(numbers) == 1 else "were"


def _rounds_with(noise: sa.ColumnElement[bool]) -> sa.Select[Any]:
    return sa.select(rounds.c.round).where((rounds.c.round > 0) & noise).distinct().order_by(rounds.c.round)


def _here() -> sa.ColumnElement[bool]:
    return rounds.c.published & rounds.c.kept & ~rounds.c.superseded


def _in_force(connection: sa.Connection, which: sa.ColumnElement[bool]) -> RoundRecord | None:
    query = sa.select(rounds).where(~rounds.c.superseded & which).order_by(rounds.c.round.desc()).limit(1)
    row = connection.execute(query).mappings().first()
    return None if row is None else round_from(row)


def _intent(connection: sa.Connection) -> sa.Row[Any] | None:
    return connection.execute(sa.select(sealing)).first()


def _drop_unless_known(connection: sa.Connection, name: str, round_number: int) -> None:
    """Drops weights that were sealed, unless a round that a rollback took back has the same."""
    for row in connection.execute(sa.select(rounds).where((rounds.c.round == round_number) & rounds.c.kept)).mappings():
        if name in names_of(round_from(row)):
            return
    drop(connection, [name])


def _why_not(round_number: int, done: list[dict[str, Any]]) -> str:
    if not done:
        return f"there is no round {round_number}"
    row = done[0]
    if row["superseded"]:
        return f"round {round_number} was taken back by a rollback"
    if not row["published"]:
        return f"round {round_number} was not published ({row['note'] or 'no reason is recorded'})"
    return f"the weights of round {round_number} are no longer kept"
