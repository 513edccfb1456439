"""Settings in TOML files: reading them, and saying what is wrong by the name of the field."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedepth.errors import ConfigError
from fedepth.printable import printable, quoted

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_BYTES = 4 << 20

# "Expected `int`, got `str` - at `$.job.rounds[0]`": how msgspec words a violation.
_VIOLATION = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. A byte-order mark in front, which some editors write, is no part of it.

    Raises:
        ConfigError: it cannot be read, has more than MOST_BYTES, or is not TOML.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a path with a NUL in it
        raise ConfigError(f"{quoted(str(path))}: cannot be read: {error}") from None
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{path}: has more than {MOST_BYTES} bytes; no settings need that many")
    try:
        # A TOMLDecodeError or UnicodeDecodeError is a ValueError, as is Python's own about an integer of 4,301 digits.
        return tomllib.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{path.name}: is not valid TOML: {printable(str(error))}") from None
    except RecursionError:
        raise ConfigError(f"{path.name}: is not valid TOML: brackets are nested too deeply") from None


def settings_path(folder: Path, text: str) -> Path:
    """A path out of a settings file, absolute; a relative one counts from `folder`, and ~ is the home directory.

    Raises:
        ConfigError: no file can have this path.
    """
    try:
        path = (folder / Path(text).expanduser()).resolve()
        path.exists()
        str(path).encode("utf-8")
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # too long; a NUL in it, or bytes that are no text; no such home, or links in a circle
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{quoted(text)} is not a path: {why}") from None
    return path


def violation(message: str) -> tuple[str, str]:
    """A message of msgspec's as the path of the field ("" if it names none) and what is wrong there."""
    match = _VIOLATION.match(message)
    assert match is not None
    return match["path"] or "", match["what"]


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known: the closest one, or all that there are.

    Names such as "memory.cap" are compared by their last word, which may merely stand in the wrong section.
    """
    everything = sorted(known)
    names = {name.rpartition(".")[2]: name for name in everything}
    near = difflib.get_close_matches(word.rpartition(".")[2], names, n=1, cutoff=0.5)
    return f"; did you mean {names[near[0]]}?" if near else f"; there are {', '.join(everything)}"
