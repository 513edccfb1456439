"""What the command lines of all three programs have in common: help, exit status, version, completion, and options.

Loads typer: an agent's own process, which runs for months, must not load this.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from fedepth import __version__
from fedepth.errors import ConfigError
from fedepth.files import disk_errors, not_writable, user_folder
from fedepth.job_sections import DIGITS
from fedepth.printable import printable, quoted
from fedepth.program import STATUSES

_WIDTH = 120  # of help; a narrower terminal decides
_NAMED = ("torch", "onnxruntime")  # distributions that decide what comes out, as far as they are installed

Run = TypeVar("Run", bound=Callable[..., Any])
Maker = TypeVar("Maker")

AddressOption = Annotated[str, typer.Option("--coordinator", help="HOST[:PORT] of a running coordinator.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, with sizes in bytes.")]
JsonLogsOption = Annotated[bool, typer.Option("--json-logs", help="Log one JSON object a line instead of text.")]


def _path(text: str) -> Path:
    """A path as it is typed. An empty one would be the working directory: `Path("")`. What most shells leave to us is
    the ~ of `--state=~/kitchen`, and of a variable in a service's settings."""
    if not text:
        raise typer.BadParameter("the path is empty; . is this folder")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise typer.BadParameter(
            f"there is no home directory for {quoted(text)}; write the path in full, or ./ before a name that begins so"
        ) from None


def data_place(text: str) -> str:
    """Where data lie, as it is typed: an absolute path, or DIGITS, of which `./digits` is none."""
    return text if text == DIGITS else str(_path(text).absolute())


def _of_paths(annotation: Any) -> bool:
    """Whether it is Annotated[Path, …], or Annotated[list[Path] | None, …] and the like."""
    inner = get_args(annotation)[0] if hasattr(annotation, "__metadata__") else None
    return inner is not None and (
        inner is Path or any(each is Path or Path in get_args(each) for each in get_args(inner))
    )


class _Program(typer.Typer):
    """A command line in which every path is read by `_path`."""

    def command(self, *names: Any, **settings: Any) -> Callable[[Run], Run]:
        register = super().command(*names, **settings)

        def with_paths(run: Run) -> Run:
            run.__annotations__ = get_type_hints(run, include_extras=True)
            for annotation in run.__annotations__.values():
                if _of_paths(annotation):
                    for told in annotation.__metadata__:
                        told.parser = _path
                        if isinstance(told, typer.models.OptionInfo):  # an argument is called by its name
                            told.metavar = "PATH"
            return register(run)

        return with_paths

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        if "--install-completion" not in sys.argv[1:]:
            return super().__call__(*arguments, **settings)
        # It writes to files of the user's shell.
        home = user_folder("", "", "set HOME to install the completion")
        with disk_errors("the completion cannot be installed", home):
            return super().__call__(*arguments, **settings)


PICTURES = ("png", "pdf", "svg")


def check_picture(path: Path) -> None:
    """Sees that a picture can be written to --plot, before the work whose result it shows.

    Raises:
        ConfigError: it is of another format than PICTURES, its folder is not there, or no file can be made there.
    """
    if path.suffix.lower().removeprefix(".") not in PICTURES:
        given = f"{printable(path.suffix)} is not one of the formats" if path.suffix else "the name says no format"
        raise ConfigError(
            f"--plot: {given}; there are {', '.join(PICTURES)}: write {printable(path.stem or 'plot')}.{PICTURES[0]}"
        )
    why = not_writable(path)
    if why:
        raise ConfigError(f"--plot: {why}")


def picture_maker(path: Path, load: Callable[[], Maker]) -> Maker:
    """What `load` imports, to draw a picture for --plot; asked before the work whose result it shows.

    Raises:
        ConfigError: matplotlib is missing, or `check_picture` raises it.
    """
    try:
        maker = load()
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed here: pip install 'fedepth[plot]'"
        ) from error
    check_picture(path)
    return maker


def command_line(name: str, about: str) -> typer.Typer:
    """A program without commands yet. Its help is plain text, which every terminal, pipe and test can show."""
    app = _Program(
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


def command_group(about: str) -> typer.Typer:
    """Commands below a program's, such as `certs init`; to be added to it."""
    return _Program(
        help=about,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["--help", "-h"], "max_content_width": _WIDTH},
    )


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
