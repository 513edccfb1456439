"""How the programs log: one line per event, with its level and time, from a level on.

Logging may fail without consequence: whoever logs has done, or is about to do, something that matters more.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import structlog

from fedepth.printable import PLAIN, printable

Write = Callable[[str], None]
Words = Callable[[Mapping[str, Any]], str | None]

_ON_EVERY_LINE = ("timestamp", "level", "lines_lost")


def configure_logs(renderer: structlog.types.Processor, write: Write | None = None, level: int = logging.INFO) -> None:
    """Sends all log lines from `level` on to standard error, or to `write`, which takes one line without its end.

    `write` may raise OSError or ValueError (a closed file): see `LineLogger`.
    """
    lines = LineLogger(write or stream_writer(sys.stderr))
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            lines.add_lost,
            make_printable,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lines,
    )


def renderer(json_lines: bool, words: Words | None = None) -> structlog.types.Processor:
    """What turns an event into a line: one for people, in colours on a terminal that has them, or a JSON object.

    Args:
        words: an event as a sentence, which then stands instead of its fields; None where it has none.
    """
    if json_lines:
        return structlog.processors.JSONRenderer()
    console = structlog.dev.ConsoleRenderer(colors=_has_colors(sys.stderr))

    def render(logger: Any, method: str, event: structlog.types.EventDict) -> str:
        said = words(event) if words else None
        if said is not None:
            event = {**{key: event[key] for key in _ON_EVERY_LINE if key in event}, "event": said}
        return console(logger, method, event)

    return render


def _has_colors(stream: TextIO | None) -> bool:
    try:
        terminal = stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False
    return terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def make_printable(_: Any, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
    """A processor: whatever a field holds, it is shown in one line and does nothing to a terminal."""
    if event.get("exc_info"):
        event["traceback"] = structlog.processors.format_exc_info(None, "", {"exc_info": event.pop("exc_info")}).get(
            "exception", ""
        )
    for key, value in event.items():
        event[key] = _shown(value)
    return event


class LineLogger:
    """A logger factory, and the logger that it makes: writes lines, and drops those that cannot be written.

    A full disk or a reader that has gone must not stop a round. The next line that can be written says how many are
    missing, in its field `lines_lost`.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._lost = 0
        self._carried = threading.local()  # what the line that this thread is about to write says of lost ones

    def __call__(self, *_: object) -> LineLogger:
        return self

    def add_lost(self, _: Any, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
        """A processor: tells of lines that were lost, once."""
        with self._lock:
            self._carried.count, self._lost = self._lost, 0
        if self._carried.count:
            event["lines_lost"] = self._carried.count
        return event

    def msg(self, line: str) -> None:
        with self._lock:
            try:
                self._write(line)
            except (OSError, ValueError):
                self._lost += 1 + getattr(self._carried, "count", 0)
            self._carried.count = 0

    debug = info = warning = error = critical = msg


def stream_writer(stream: TextIO | None) -> Write:
    """Writes lines to the file behind `stream`, past its buffer, or to the stream itself where there is no file.

    A buffer keeps what could not be written, writes it later, in pieces and out of order, and fails again when the
    program ends.
    """
    if stream is None:  # the program was started with standard error closed

        def refuse(line: str) -> None:
            raise ValueError("there is no standard error")

        return refuse
    try:
        descriptor = stream.fileno()
    except (io.UnsupportedOperation, ValueError, AttributeError):

        def write(line: str) -> None:
            stream.write(line + "\n")
            stream.flush()

        return write
    return _RawLines(descriptor, stream.encoding or "utf-8").write


class _RawLines:
    """Whole lines to a file descriptor, which stays its owner's."""

    def __init__(self, descriptor: int, encoding: str) -> None:
        self._file = io.FileIO(descriptor, "wb", closefd=False)
        self._encoding = encoding
        self._cut = False  # the last line was written in part

    def write(self, line: str) -> None:
        """Raises OSError if not all of it could be written."""
        left = memoryview(f"{line}\n".encode(self._encoding, PLAIN))
        if self._cut:
            left = memoryview(b"\n" + left)
        whole = len(left)
        try:
            while left:
                written = self._file.write(left)
                if written is None:
                    raise BlockingIOError("the reader of the log does not keep up")
                left = left[written:]
            self._cut = False
        except OSError:
            self._cut = self._cut or len(left) < whole
            raise


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [_shown(each) for each in value]
    if isinstance(value, dict):
        return {printable(str(key)): _shown(each) for key, each in value.items()}
    return printable(str(value))
