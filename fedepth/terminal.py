"""How programs show things to people: one console for all of them, and JSON that any terminal can carry.

Where a terminal cannot show a character (box-drawing lines, arrows, "…"), plain ones take its place: tables look it up
in the console's encoding, and everything else goes through `fedepth.printable.PLAIN`, which `fedepth.program` sets.
Colours are rich's decision: none with NO_COLOR, with TERM=dumb, in pipes and in files.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import msgspec
from rich.console import Console

PLAIN_WIDTH = 200  # of tables that are piped or written to a file: there is no terminal whose width would matter
_LEAST_WIDTH = 20  # of a terminal; tables need a few characters
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Called while the error is handled. Rich would end the program; what it means is for the caller to say."""
        error = sys.exc_info()[1]
        if error is not None:
            raise error


def console(*, stderr: bool = False, soft_wrap: bool = False) -> Console:
    """A console on standard output, or on standard error."""
    stream = sys.stderr if stderr else sys.stdout
    terminal = stream is not None and stream.isatty()
    found = _Console(stderr=stderr, highlight=False, soft_wrap=soft_wrap, width=None if terminal else PLAIN_WIDTH)
    if found.width < _LEAST_WIDTH:
        found.width = _LEAST_WIDTH
    return found


def print_json(value: Any) -> None:
    """One line of JSON on standard output, in ASCII: it stays what it is in every encoding."""
    print(ascii_json(msgspec.json.encode(value).decode()), flush=True)


def ascii_json(text: str) -> str:
    """The same JSON; characters beyond ASCII, which stand in strings only, are escaped."""
    return _NOT_ASCII.sub(lambda match: json.dumps(match[0])[1:-1], text)
