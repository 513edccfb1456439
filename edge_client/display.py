"""What a person sees on a terminal: a bar for the task, and log lines above it. Loads rich."""

from __future__ import annotations

import contextlib

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from fedepth.printable import printable
from fedepth.task import Progress as TaskProgress
from fedepth.terminal import console


class Bar:
    """Where the task is, on a terminal.

    Lines and bar go through one console, so that neither overwrites the other.
    """

    def __init__(self, on: Console | None = None) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._console = on or console(stderr=True)
        self._progress = Progress(*columns, console=self._console, transient=True)
        self._line: TaskID | None = None

    def show(self, now: TaskProgress | None) -> None:
        """Draws `now`; None takes the bar away. A terminal that is gone shows nothing, and training goes on."""
        with contextlib.suppress(OSError):
            self._show(now)

    def write_line(self, line: str) -> None:
        """Prints a log line above the bar. Its colours are kept, so what else stands in it has to be printable.

        Raises:
            OSError: the terminal is gone.
        """
        self._console.print(Text.from_ansi(line), soft_wrap=True)

    def _show(self, now: TaskProgress | None) -> None:
        if now is None:
            if self._line is not None:
                self._progress.remove_task(self._line)
                self._line = None
                self._progress.stop()
            return
        trains = now.stage_count > 0
        activity = printable(now.activity)
        name = f"{activity}: stage {now.stage + 1}/{now.stage_count}" if trains else activity
        note = f"epoch {now.epoch}/{now.epochs}, loss {now.loss:.4f}" if now.epochs else ""
        total = float(now.stage_count * max(1, now.epochs)) if trains else None
        done = now.stage * max(1, now.epochs) + now.epoch
        if self._line is None:
            self._line = self._progress.add_task("", note="")
        self._progress.update(self._line, description=name, total=total, completed=done, note=note)
        self._progress.start()
