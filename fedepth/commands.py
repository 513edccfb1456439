"""What the command lines of all three programs have in common: help, exit status, version, completion, and options.

Loads typer: an agent's own process, which runs for months, must not load this.
"""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Annotated

import typer

from fedepth import __version__
from fedepth.program import STATUSES

_WIDTH = 120  # of help; a narrower terminal decides
_NAMED = ("torch", "onnxruntime")  # distributions that decide what comes out, as far as they are installed

AddressOption = Annotated[str, typer.Option("--coordinator", help="HOST[:PORT] of a running coordinator.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, with sizes in bytes.")]
JsonLogsOption = Annotated[bool, typer.Option("--json-logs", help="Log one JSON object a line instead of text.")]


def command_line(name: str, about: str) -> typer.Typer:
    """A program without commands yet. Its help is plain text, which every terminal, pipe and test can show."""
    app = typer.Typer(
        name=name,
        help=about,
        epilog=STATUSES,
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["--help", "-h"], "max_content_width": _WIDTH},
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            print(version_line(name))
            raise typer.Exit

    version = typer.Option(False, "--version", help="Show the versions and exit.", callback=show_version, is_eager=True)

    @app.callback()
    def common(version: bool = version) -> None:
        pass

    common.__doc__ = about
    return app


def version_line(name: str) -> str:
    """The versions of the program and of what it stands on; nothing heavy is loaded for it."""
    found = [f"{name} {__version__}", f"Python {platform.python_version()}"]
    for each in _NAMED:
        try:
            found.append(f"{each} {importlib.metadata.version(each)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def examples(*lines: str) -> str:
    """The end of a command's help: what may be typed, each on a line that is not broken."""
    shown = "\n".join(f"Example: {line}" for line in lines)
    return f"\b\n{shown}"
