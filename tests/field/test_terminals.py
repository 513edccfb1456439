"""Terminals as people have them: encodings, widths, pipes. A new case is a line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from rich.table import Table

import coordinator.cli
import edge_client.cli
import fedepth.cli
from fedepth.logs import stream_writer
from fedepth.printable import PLAIN
from fedepth.terminal import ascii_json, console, print_json

ENCODINGS = ["ascii", "latin-1", "cp1252", "koi8-r", "utf-8"]
TEXT = "a → b, 3 × 4 … “ü” ─ 日"


def stream(encoding: str, *, terminal: bool = False) -> io.TextIOWrapper:
    class Raw(io.BytesIO):
        def isatty(self) -> bool:
            return terminal

    return io.TextIOWrapper(Raw(), encoding=encoding, errors=PLAIN)


def written(to: io.TextIOWrapper) -> bytes:
    to.flush()
    buffer: Any = to.buffer
    return bytes(buffer.getvalue())


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", r'a -> b, 3 x 4 ... "\xfc" - \u65e5'),
        ("latin-1", 'a -> b, 3 × 4 ... "ü" - \\u65e5'),
        ("cp1252", "a -> b, 3 × 4 … “ü” - \\u65e5"),
        ("utf-8", TEXT),
    ],
)
def test_what_cannot_be_shown_is_shown_plainly(encoding: str, shown: str) -> None:
    assert TEXT.encode(encoding, PLAIN).decode(encoding) == shown
    assert TEXT.encode(encoding, PLAIN).decode(encoding).isprintable()


def test_a_log_line_is_plain_as_well(tmp_path: Any) -> None:
    with open(tmp_path / "log", "w", encoding="ascii") as file:
        stream_writer(file)("3.000 → 2.000…")
    assert (tmp_path / "log").read_text() == "3.000 -> 2.000...\n"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TERM", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch


TERMINALS: list[dict[str, str]] = [
    {},
    {"TERM": "dumb"},
    {"TERM": "xterm-256color"},
    {"TERM": "xterm-256color", "NO_COLOR": "1"},
    {"TERM": "unknown-terminal"},
    {"COLUMNS": "20"},
    {"COLUMNS": "1"},
    {"COLUMNS": "0"},
    {"COLUMNS": "-3"},
    {"COLUMNS": "wide"},
    {"COLUMNS": "99999"},
]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("variables", TERMINALS, ids=str)
@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_a_table_and_a_spinner_on_any_terminal(
    terminal: bool, variables: dict[str, str], encoding: str, environment: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    out, err = stream(encoding, terminal=terminal), stream(encoding, terminal=terminal)
    environment.setattr("sys.stdout", out)
    environment.setattr("sys.stderr", err)
    table = Table("ü → loss", "bytes", title="…")
    table.add_row("3.0 → 2.0", "1 × 2")
    with console(stderr=True).status("starting …"):
        console().print(table)
    shown = written(out).decode(encoding)
    assert "bytes" in shown or terminal  # a narrow one breaks words
    if encoding != "utf-8":
        assert not set("─│┃━┏→") & set(shown)
    if not terminal or variables.get("TERM") == "dumb":
        assert "\x1b" not in shown
        assert "\x1b" not in written(err).decode(encoding)
    if "NO_COLOR" in variables:
        assert "\x1b[3" not in shown.replace("\x1b[3m", "")  # italics are no colour


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_is_no_obstacle(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, closed, None)
    with console(stderr=True).status("starting"):
        console().print("x")
        print_json({})


def test_json_is_the_same_in_every_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"naïve → 日": "… 😀 \x7f"}
    shown = set()
    for encoding in ENCODINGS:
        out = stream(encoding)
        monkeypatch.setattr("sys.stdout", out)
        print_json(value)
        shown.add(written(out))
    assert len(shown) == 1
    assert json.loads(shown.pop()) == value
    assert json.loads(ascii_json(json.dumps(value, ensure_ascii=False))) == value


PROGRAMS: list[tuple[str, list[str]]] = [
    ("fedepth", ["--help"]),
    ("coordinator", ["serve", "--help"]),
    ("edge_client", ["run", "--help"]),
    ("edge_client", ["probe"]),
    ("edge_client", ["probe", "--json"]),
]
SURROUNDINGS: list[dict[str, str]] = [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "20"},
    {"LC_ALL": "xx_YY.nonsense", "TERM": "dumb"},
    {"PYTHONIOENCODING": "latin-1", "NO_COLOR": "1"},
    {"PYTHONIOENCODING": "ascii:strict", "COLUMNS": "1"},
]


@pytest.mark.parametrize(("number", "program"), list(enumerate(PROGRAMS)), ids=lambda each: str(each)[:40])
def test_real_programs_on_odd_terminals(number: int, program: tuple[str, list[str]]) -> None:
    module, argv = program
    surroundings = SURROUNDINGS[number % len(SURROUNDINGS)]
    kept = {name: value for name, value in os.environ.items() if name not in ("LANG", "LC_ALL", "LC_CTYPE", "COLUMNS")}
    command = [sys.executable, "-m", module, *argv]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60, env=kept | surroundings)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b" not in done.stdout
    if "xx_YY" not in surroundings.get("LC_ALL", ""):
        assert done.stdout.isascii()
    if "--json" in argv:
        json.loads(done.stdout)


def test_no_program_makes_a_console_of_its_own() -> None:
    for module in (fedepth.cli, coordinator.cli, edge_client.cli):
        assert not hasattr(module, "Console")
