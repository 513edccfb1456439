"""What this device can train on: counted, with damaged files left out, and said once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path

import structlog

from edge_client.config import Config
from edge_client.data_check.client import check_files, check_rows
from edge_client.data_check.protocol import CheckRequest, RowRequest
from fedepth.data.column_sums import ColumnSums
from fedepth.data.damage import Damage, RowCheck, check_share, load_damage, load_row_check
from fedepth.data.folders import LeftOut
from fedepth.data.idx_sets import find_idx
from fedepth.data.labels import lacking, listed
from fedepth.data.row_files import any_row_files, asked_of, find_rows, fingerprint, holds_rows, left_out
from fedepth.data.scan import DataSummary, NoImagesError, scan
from fedepth.errors import DataError
from fedepth.files import disk_errors
from fedepth.printable import printable
from fedepth.task import ModelSpec, TableSpec, Task, TextSpec

CheckFiles = Callable[[CheckRequest, Callable[[int], None]], Awaitable[Damage]]
CheckRows = Callable[[RowRequest, Callable[[int], None]], Awaitable[RowCheck]]

_ROWS = 20  # of what is left out; and so many damaged files
_log = structlog.get_logger()


class Samples:
    """The training data of one device.

    Attributes:
        summary: of the last look.
        damage: the files that were left out at it.
        columns: what rows have in the columns of a table, while a job asks for it before its first task.
    """

    def __init__(self, config: Config, check: CheckFiles = check_files, check_rows: CheckRows = check_rows) -> None:
        self._directory = config.data_dir
        self._most_damaged = config.most_damaged
        self._record = config.state_dir / "data-check"
        self._check = check
        self._check_rows = check_rows
        self._rows: RowCheck | None = None  # of the last look
        self._told: object = None
        self._looked = False
        self._told_lacking: tuple[str, str] = ("", "")
        self._model: ModelSpec | None = None  # of the last job whose task was taken on; it says what rows are
        self._told_of_job: tuple[str, tuple[int, ...]] = ("", ())
        self.summary = DataSummary(0, (), "", ())
        self.damage = Damage()
        self.columns: ColumnSums | None = None

    @property
    def count(self) -> int:
        return self.summary.sample_count

    def count_for(self, classes: Sequence[str]) -> int:
        """The samples for a job with these classes, as the coordinator counts them from a report."""
        return self.summary.count_for(classes)

    @property
    def folders(self) -> dict[str, int]:
        """Images by folder, as a report has them (`DataSummary.folders`)."""
        counts: Counter[str] = Counter()
        for name, count in self.summary.folders.items():
            counts[printable(name)] += count
        return dict(counts)

    @property
    def class_names(self) -> tuple[str, ...]:
        """As a report has them: what is no text cannot be sent."""
        return tuple(map(printable, self.summary.classes)) if self.summary.layout in ("folders", "rows") else ()

    def differs(self, other: DataSummary) -> bool:
        """Whether there is other data than at that look."""
        return (self.summary.fingerprint, self.summary.class_counts, self.summary.classes) != (
            other.fingerprint,
            other.class_counts,
            other.classes,
        )

    async def look(self, *, decode: bool = False) -> None:
        """Counts what is there by now; files that are new or changed are checked first.

        Says what is left out, if it is not the same as the last time.

        Args:
            decode: a file turned out to be damaged where no look at it could tell: decode all of them.

        Raises:
            DataError: there is nothing to train on, or too much of it is damaged.
            DiskError: it cannot be read.
            ChildError: the check of the files failed.
        """
        if await asyncio.to_thread(self._holds_rows):
            await self._look_at_rows()
            return
        damage = self.damage if self.damage.unsaved else load_damage(self._record)
        summary = await asyncio.to_thread(self._scan, damage)
        is_new = summary.fingerprint != damage.fingerprint or (not self._looked and damage.damaged)
        self._looked = True
        if summary.layout == "folders" and (is_new or (decode and not damage.decoded)):
            total = sum(summary.folders.values()) if summary.folders else summary.sample_count

            def progress(files: int) -> None:
                _log.info("checking the image files", files=files, of=total)

            request = CheckRequest(str(self._directory.resolve()), str(self._record), decode)
            damage = await self._check(request, progress)
            if damage.unsaved:
                _log.warning("the check of the data cannot be recorded; it is repeated", error=damage.unsaved)
            try:
                summary = await asyncio.to_thread(self._scan, damage)
            except NoImagesError as error:  # nothing is left
                keys = error.walk.damaged
                check_share(0, len(keys), self._most_damaged, _messages(damage, keys), "most_damaged")
                raise
        self.summary, self.damage = summary, damage
        self._tell()
        self._check_share(summary)

    def forget_job(self) -> None:
        """The next look is as the first was: another job may run there by now, which has other classes."""
        self._model = None
        self.columns = None

    async def for_survey(self, spec: ModelSpec) -> None:
        """Goes through the rows for a job that has not begun; `columns` has what came of it.

        Raises:
            DataError: there are no rows with these columns.
            ChildError: the check of rows failed.
        """
        await self._look_for_rows(spec)
        self.columns = self._rows.sums if self._rows is not None else None

    async def _look_for_rows(self, spec: ModelSpec) -> None:
        assert spec.columns is not None, "only rows have columns"
        if not await asyncio.to_thread(any_row_files, self._directory):
            raise DataError(_wants_rows(spec.columns, self._directory))
        self._model = spec
        await self._look_at_rows()

    async def for_task(self, task: Task) -> DataSummary:
        """The samples by class of the job. Says once which classes this device lacks.

        Raises:
            DataError: there are samples of other classes, or of another kind.
            ChildError: the check of rows failed.
        """
        spec = task.model
        self.columns = None
        if spec.columns is not None:
            await self._look_for_rows(spec)
            summary = self.summary
        else:
            self._model = spec
            if not self._directory.is_dir():
                raise DataError(_wants_images(spec.name, self._directory))
            summary = await asyncio.to_thread(self._scan_for, spec)
        if summary.sample_count != self.count and self._told_of_job != (task.job, summary.class_counts):
            self._told_of_job = (task.job, summary.class_counts)
            _log.info(
                "training data for this job",
                job=task.job,
                samples=summary.sample_count,
                classes=sum(1 for count in summary.class_counts if count),
            )
        missing = lacking(spec.classes, summary.class_counts)
        if missing and self._told_lacking != (task.job, listed(missing)):
            self._told_lacking = (task.job, listed(missing))
            _log.warning(
                "this device has no samples of some classes of the job",
                job=task.job,
                lacking=listed(missing),
                classes=len(spec.classes),
            )
        return summary

    def _scan_for(self, spec: ModelSpec) -> DataSummary:
        summary = scan(self._directory, spec.classes, first_label=spec.first_label, damage=self.damage.keys)
        self._check_share(summary)
        return summary

    async def _look_at_rows(self) -> None:
        """Counts the rows that the last job can use, or before any job all of them that can be read."""
        found = await self._checked_rows()
        self._looked = True
        self.damage = Damage(dict(enumerate(found.examples)))
        if self.columns is not None:
            self.columns = found.sums  # of what is there by now
        self.summary = DataSummary(
            found.count,
            found.class_counts,
            "rows",
            self._model.classes if self._model is not None else (),
            await asyncio.to_thread(self._left_out_of_rows),
            found.damaged,
            fingerprint=found.fingerprint,
        )
        self._tell()
        messages = dict(enumerate(found.examples))
        check_share(found.count, found.damaged, self._most_damaged, messages, "most_damaged", "rows")
        if not found.count:
            raise DataError(f"{printable(str(self._directory))} holds no row to train on")

    async def _checked_rows(self) -> RowCheck:
        record = self._record
        now = await asyncio.to_thread(self._fingerprint_of_rows)
        for known in (self._rows, load_row_check(record)):
            if known is None or (known.fingerprint, known.asked) != (now, asked_of(self._model)):
                continue
            if known.sums is not None or self._model is None or self._model.table is None:
                self._rows = known
                return known

        def progress(rows: int) -> None:
            _log.info("checking the rows", rows=rows)

        request = RowRequest(str(self._directory.resolve()), str(record), self._model)
        self._rows = found = await self._check_rows(request, progress)
        if found.unsaved:
            _log.warning("the check of the data cannot be recorded; it is repeated", error=found.unsaved)
        return found

    def _holds_rows(self) -> bool:
        """What the last job wanted; before any, what seems to be there."""
        if self._model is not None:
            return self._model.columns is not None
        with disk_errors("the training samples cannot be counted", self._directory):
            return holds_rows(self._directory) and not (self._directory.is_dir() and find_idx(self._directory, "train"))

    def _fingerprint_of_rows(self) -> int:
        with disk_errors("the training samples cannot be counted", self._directory):
            return fingerprint(find_rows(self._directory, "train"))

    def _left_out_of_rows(self) -> tuple[LeftOut, ...]:
        with disk_errors("the training samples cannot be counted", self._directory):
            return left_out(self._directory, "train")

    def _check_share(self, summary: DataSummary) -> None:
        messages = _messages(self.damage, summary.damaged_keys)
        check_share(summary.sample_count, summary.damaged, self._most_damaged, messages, "most_damaged")

    def _scan(self, damage: Damage) -> DataSummary:
        with disk_errors("the training samples cannot be counted", self._directory):
            return scan(self._directory, None, damage=damage.keys)

    def _tell(self) -> None:
        summary = self.summary
        rows = summary.layout == "rows"
        messages = self.damage.damaged if rows else _messages(self.damage, summary.damaged_keys)
        what = (summary.sample_count, summary.class_counts, summary.left_out, summary.notes, *messages.values())
        if what == self._told:
            return
        self._told = what
        unused = sum(row.count for row in summary.left_out) + (summary.damaged if rows else 0)
        _log.info(
            "training data",
            directory=printable(str(self._directory)),
            samples=summary.sample_count,
            classes=sum(1 for count in summary.class_counts if count),
            left_out=unused,
        )
        for note in summary.notes:
            _log.info("training data", note=printable(note))
        for row in summary.left_out[:_ROWS]:
            _log.warning(
                "left out of the training data",
                folder=printable(row.folder) or ".",
                reason=row.reason,
                number=row.count,
                such_as=printable(row.example),
            )
        if len(summary.left_out) > _ROWS:
            _log.warning("left out of the training data", further_reasons=len(summary.left_out) - _ROWS)
        for message in [*messages.values()][:_ROWS]:
            _log.warning("damaged", **{"row" if rows else "file": message})


def _messages(damage: Damage, keys: Collection[int]) -> dict[int, str]:
    """What is wrong with the files of these keys, as far as it is known."""
    return {key: message for key, message in damage.damaged.items() if key in keys}


def _wants_images(model: str, source: Path) -> str:
    return (
        f"{printable(str(source))} is a file of rows, and {model} takes other inputs: a job trains on rows if it has a "
        "section [text] or [table]; give this device a folder with folders of images, or with IDX files"
    )


def _wants_rows(columns: TextSpec | TableSpec, source: Path) -> str:
    return (
        f"the job trains on rows of files with the columns {listed([columns.label])} (the class) and "
        f"{listed(columns.columns)}; {printable(str(source))} holds none: give this device a CSV, JSON-lines or "
        "Parquet file, or a folder with train.csv"
    )
