"""What a person sees while a simulation runs: a bar with the time left on a terminal, a line for every round else."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedepth.printable import printable
from fedepth.simulation.record import RoundLine

_REMEMBERED = 10  # rounds that the time left is told from


class Reporter:
    """Shows how far a simulation is. To be used as a context."""

    def __init__(self, out: Console, rounds: int) -> None:
        self._out = out
        self._rounds = rounds
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._began = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if out.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn(),
                console=out, transient=True,
            )  # fmt: skip

    def __enter__(self) -> Reporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One sentence, kept on the screen."""
        self._out.print(printable(text), markup=False, soft_wrap=True)

    def begin_round(self, number: int, tasks: int) -> None:
        """A round of so many tasks begins."""
        self._began = time.monotonic()
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(f"round {number} of {self._rounds}", total=tasks, text=self._left(number))

    def task_done(self) -> None:
        """One of them is over."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)

    def trained(self) -> None:
        """All tasks of the round are over."""
        self._seconds.append(time.monotonic() - self._began)

    def round_closed(self, line: RoundLine) -> None:
        """A round is recorded."""
        what = "" if line.accuracy is None else f"accuracy {line.accuracy:.2%}, loss {line.loss:.4g}, "
        text = f"round {line.round} of {self._rounds}: {what}{line.updates} updates, {line.seconds:.1f} s"
        if not line.published:
            text += f"; not published: {line.note}"
        left = self._left(line.round + 1)
        self.say(f"{text}; {left}" if left else text)

    def _left(self, number: int) -> str:
        rounds = self._rounds - number + 1
        if not self._seconds or rounds <= 0:
            return ""
        return f"{duration(rounds * sum(self._seconds) / len(self._seconds))} left"


def duration(seconds: float) -> str:
    """For people: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
