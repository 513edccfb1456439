"""Log lines stay lines, and a log that cannot be written harms nobody."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
import structlog

from coordinator.observe.logs import renderer
from fedepth.logs import configure_logs, stream_writer

PLAIN = structlog.dev.ConsoleRenderer(colors=False)
HOSTILE = "a\x1b[2J\nlevel=error event=forged\u202e\u2028[red]"


@pytest.fixture(autouse=True)
def configured() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


def logged(render: Any, **fields: Any) -> str:
    lines: list[str] = []
    configure_logs(render, lines.append)
    structlog.get_logger().info("seen", **fields)
    (line,) = lines
    return line


@pytest.mark.parametrize("render", [renderer(False), renderer(True), PLAIN], ids=["logfmt", "JSON", "console"])
@pytest.mark.parametrize(
    "value",
    [HOSTILE, [HOSTILE], (HOSTILE,), {"a": HOSTILE}, Path(HOSTILE), ValueError(HOSTILE)],
    ids=lambda value: type(value).__name__,
)
def test_whatever_a_field_holds_the_line_stays_one_line(render: Any, value: Any) -> None:
    line = logged(render, device=value)
    assert line.isprintable()
    assert "forged" in line


def test_a_traceback_stays_in_its_line_too() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        line = logged(PLAIN, exc_info=error)
    assert line.isprintable()
    assert "test_logs.py" in line
    assert "forged" in line


def test_numbers_stay_numbers() -> None:
    fields = json.loads(logged(renderer(True), samples=3, loss=0.5, good=True, nothing=None, names=["a", "b"]))
    assert [fields[name] for name in ("samples", "loss", "good", "nothing", "names")] == [
        *(3, 0.5, True, None),
        ["a", "b"],
    ]


class Flaky:
    """Takes lines, except while it is told to fail."""

    def __init__(self, error: Exception) -> None:
        self.error: Exception | None = error
        self.lines: list[dict[str, Any]] = []

    def write(self, line: str) -> None:
        if self.error is not None:
            raise self.error
        self.lines.append(json.loads(line))


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device"), ValueError("closed")])
def test_lines_that_cannot_be_written_are_dropped_and_counted(error: Exception) -> None:
    flaky = Flaky(error)
    configure_logs(renderer(True), flaky.write)
    log = structlog.get_logger()
    for number in range(3):
        log.info("lost", number=number)
    flaky.error = None
    log.info("first")
    log.info("second")
    flaky.error = error
    log.info("lost")
    flaky.error = None
    log.info("third")
    assert [(line["event"], line.get("lines_lost", 0)) for line in flaky.lines] == [
        ("first", 3),
        ("second", 0),
        ("third", 1),
    ]


def test_a_pipe_whose_reader_has_gone_harms_nobody() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        configure_logs(PLAIN, stream_writer(stream))
        os.close(reader)
        for _ in range(1000):
            structlog.get_logger().info("into nothing")
    # Closing the stream flushes it: nothing of the lines is left in its buffer.


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_harms_nobody() -> None:
    with open("/dev/full", "w") as stream:
        configure_logs(PLAIN, stream_writer(stream))
        for _ in range(1000):
            structlog.get_logger().info("into nothing")


def test_a_pipe_that_is_full_does_not_hold_anybody_up_for_ever_and_resumes_on_a_new_line() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with os.fdopen(writer, "w") as stream, os.fdopen(reader, "rb") as source:
        configure_logs(renderer(True), stream_writer(stream))
        log = structlog.get_logger()
        log.info("long", text="x" * (1 << 20))  # written in part
        log.info("lost")
        os.set_blocking(reader, False)
        held = source.read()
        assert len(held) >= 4096
        log.info("short")
        _, line = source.read().rsplit(b"\n", 2)[-3:-1]
        assert json.loads(line)["lines_lost"] == 2


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_closed_stream_harms_nobody(stream: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if stream:
        stream = open(tmp_path / "log", "w")  # noqa: SIM115
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logs(PLAIN)
    structlog.get_logger().info("into nothing")


def test_a_stream_without_a_file_gets_its_lines() -> None:
    stream: TextIO = io.StringIO()
    configure_logs(renderer(True), stream_writer(stream))
    structlog.get_logger().info("one")
    assert json.loads(stream.getvalue())["event"] == "one"  # type: ignore[attr-defined]


def test_what_an_encoding_cannot_write_is_escaped(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w", encoding="ascii") as stream:
        configure_logs(PLAIN, stream_writer(stream))
        structlog.get_logger().info("seen", device="Küche")
    assert b"K\\xfcche" in (tmp_path / "log").read_bytes()
