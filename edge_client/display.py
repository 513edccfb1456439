"""What a person sees on a terminal: a bar for the task, and log lines above it. Loads rich."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from fedepth.task import Progress as TaskProgress


class Bar:
    """Where the task is, on a terminal."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._line: TaskID | None = None

    @property
    def console(self) -> Console:
        return self._progress.console

    def show(self, now: TaskProgress | None) -> None:
        """Draws `now`; None takes the bar away."""
        if now is None:
            if self._line is not None:
                self._progress.remove_task(self._line)
                self._progress.stop()
                self._line = None
            return
        if self._line is None:
            self._progress.start()
            self._line = self._progress.add_task("", note="")
        trains = now.stage_count > 0
        name = f"{now.activity}: stage {now.stage + 1}/{now.stage_count}" if trains else now.activity
        note = f"epoch {now.epoch}/{now.epochs}, loss {now.loss:.4f}" if now.epochs else ""
        total = float(now.stage_count * max(1, now.epochs)) if trains else None
        done = now.stage * max(1, now.epochs) + now.epoch
        self._progress.update(self._line, description=name, total=total, completed=done, note=note)


class BarLogger:
    """Prints lines through the console that draws the bar, so that neither overwrites the other."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, *_: object) -> BarLogger:
        return self

    def msg(self, line: str) -> None:
        self._console.print(Text.from_ansi(line), soft_wrap=True)

    debug = info = warning = error = critical = msg
