"""What a person sees on a terminal while a device trains."""

from __future__ import annotations

import io
import os

from rich.console import Console

from edge_client.display import Bar
from fedepth.task import Progress


def shown(activity: str) -> str:
    stream = io.StringIO()
    bar = Bar(Console(file=stream, force_terminal=True, width=120, color_system=None))
    bar.show(Progress("t", 1, "d", activity, stage=1, stage_count=3, epoch=1, epochs=2, loss=0.5))
    bar.write_line("a line [red] with brackets")
    bar.show(None)
    return stream.getvalue()


def test_the_bar_shows_where_the_task_is_and_lines_stand_above_it() -> None:
    text = shown("training")
    assert "training: stage 2/3" in text
    assert "epoch 1/2, loss 0.5000" in text
    assert "a line [red] with brackets" in text


def test_names_are_neither_markup_nor_codes() -> None:
    text = shown("[red]\x1b[2J\u202e")
    assert r"[red]\x1b[2J\u202e: stage 2/3" in text
    assert "\x1b[2J" not in text
    assert "\u202e" not in text


def test_a_terminal_that_is_gone_stops_nobody() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stream:
        bar = Bar()
        bar._console.file = stream
        bar.show(Progress("t", 1, "d", "training", stage=1, stage_count=3))
        bar.show(None)
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what the stream still buffers goes there
