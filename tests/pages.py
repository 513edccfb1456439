"""What README.md and docs/*.md show in blocks: settings, output, and commands as they are typed."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from tests.field.command_pages import PROGRAMS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of a page: what it is of, such as "toml", and its lines."""

    kind: str
    text: str


@dataclass(frozen=True)
class Typed:
    """A command as a page has it, without its comment.

    Attributes:
        program: "fedepth-client", "make", or "python -m benchmarks.demo".
        into: the file that its output goes to, or "".
    """

    line: str
    program: str
    arguments: tuple[str, ...]
    into: str = ""


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, from top to bottom."""
    return [Block(*found) for found in _BLOCK.findall(page.read_text(encoding="utf-8"))]


def typed(block: Block) -> Iterator[Typed]:
    """The commands of a block of the kind "console"."""
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        into = ""
        if ">" in words:
            *words, _, into = words
        if words[1:2] == ["-m"]:
            words = [" ".join(("python", *words[1:3])), *words[3:]]
        yield Typed(shlex.join(words), words[0], tuple(words[1:]), into)


def commands_of(page: Path) -> list[Typed]:
    """All commands of a page."""
    return [each for block in blocks(page) if block.kind == "console" for each in typed(block)]


def parse(command: Typed) -> dict[str, Any]:
    """The values that the program takes from its command line. Nothing is run; a usage error is raised."""
    found: Any = typer.main.get_command(_app(command.program))
    arguments = list(command.arguments)
    if subcommands := getattr(found, "commands", None):
        assert arguments and arguments[0] in subcommands, command.line
        found = subcommands[arguments.pop(0)]
        if below := getattr(found, "commands", None):  # such as certs init
            assert arguments and arguments[0] in below, command.line
            found = below[arguments.pop(0)]
    values: dict[str, Any] = found.make_context(command.program, arguments).params
    return values


def _app(program: str) -> typer.Typer:
    if program in PROGRAMS:
        return PROGRAMS[program]
    package = program.removeprefix("python -m ")
    inside = ROOT / package.replace(".", "/") / "__main__.py"
    module = importlib.import_module(f"{package}.__main__" if inside.exists() else package)
    app = getattr(module, "app", None)
    if not isinstance(app, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command()(module.main)
    return app
