"""docs/commands.md, made of the programs themselves: `python -m tests.field.command_pages > docs/commands.md`."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Iterator
from typing import Any

import typer

from coordinator.cli import app as coordinator
from edge_client.cli import app as client
from fedepth.cli import app as planner
from fedepth.program import STATUSES

PROGRAMS: dict[str, typer.Typer] = {
    "fedepth": planner,
    "fedepth-client": client,
    "fedepth-coordinator": coordinator,
}
_HEAD = f"""# Commands

Every program has `--help`, `--version`, and completion for shells (`--install-completion`); every command that shows
something has `--json`. {STATUSES}

This page is made of the programs: `python -m tests.field.command_pages > docs/commands.md`.
"""


def commands(program: str) -> dict[str, Any]:
    """The commands of a program by their names, such as "serve" and "certs init"."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(PROGRAMS[program]).commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        found |= {f"{name} {each}": one for each, one in below.items()} if below else {name: command}
    return found


def example_lines(command: Any) -> list[str]:
    """What the help of a command shows to be typed."""
    lines = (command.epilog or "").splitlines()
    return [line.removeprefix("Example: ") for line in lines if line.startswith("Example: ")]


def page() -> str:
    """The whole text."""
    parts = [_HEAD]
    for program in PROGRAMS:
        for name, command in commands(program).items():
            parts.append("\n".join(_command(f"{program} {name}", command)))
    return "\n".join(parts)


def _command(title: str, command: Any) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{inspect.cleandoc(command.help)}\n"
    yield "```console"
    yield from example_lines(command)
    yield "```\n"
    yield "| option | what |"
    yield "|---|---|"
    for option in command.params:
        names = ", ".join(option.opts) if option.param_type_name == "option" else option.name.upper()
        yield f"| `{names}` | {_told(option)} |"
    yield ""


def _told(option: Any) -> str:
    text = str(option.help or "").replace("|", "\\|")
    value = option.default.value if isinstance(option.default, enum.Enum) else option.default
    if option.required:
        return f"{text} Required."
    if option.show_default and isinstance(value, str | int | float) and not isinstance(value, bool):
        return f"{text} Default: {value}."
    return text


if __name__ == "__main__":
    print(page(), end="")
