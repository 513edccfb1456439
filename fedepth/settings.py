"""Settings in TOML files: reading them, and saying what is wrong by the name of the field."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedepth.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# "Expected `int`, got `str` - at `$.job.rounds[0]`": how msgspec words a violation.
_VIOLATION = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path.name}: is not valid TOML: {error}") from None


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
