"""Where in a user's code something happened: the file and line that a message names."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)(?:\n\s+(\S[^\n]*))?')
_NOT_THE_USERS = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[1]}/", "<frozen", "<string>", "<eval")


def user_line(node: fx.Node) -> str:
    """The innermost line outside torch that a node of a graph comes from."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or _inner_trace(node))
    theirs = [frame for frame in frames if not frame[0].startswith(_NOT_THE_USERS)]
    return _told(*theirs[-1]) if theirs else f"operator {node.name}"


def _inner_trace(node: fx.Node) -> str:
    """Of the first operator inside a region, such as one under autocast, which has no trace of its own."""
    for given in node.args:
        if isinstance(given, fx.Node) and given.op == "get_attr":
            inner = getattr(given.graph.owning_module, str(given.target), None)
            if isinstance(inner, fx.GraphModule):
                return next((t for each in inner.graph.nodes if (t := each.meta.get("stack_trace"))), "")
    return ""


def guard_lines(guard: Any) -> list[str]:
    """The lines outside torch that a guard on a size comes from."""
    frames = [frame for frame in (guard.sloc.maybe_user_loc, guard.sloc.framework_loc) if hasattr(frame, "filename")]
    return [
        _told(frame.filename, str(frame.lineno), frame.name, frame.line or "")
        for frame in frames
        if not frame.filename.startswith(_NOT_THE_USERS)
    ]


def error_line(error: BaseException) -> str:
    """The innermost line outside torch and this package that an error went through; empty if there is none."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_NOT_THE_USERS) and "/importlib/" not in frame.filename
    ]
    own = [frame for frame in frames if "/lib/python" not in frame.filename or "site-packages" in frame.filename]
    if not own:
        return ""
    frame = own[-1]
    return _told(frame.filename, str(frame.lineno), frame.name, frame.line or "")


def is_users(file: str) -> bool:
    """Whether code in this file is neither torch's nor this package's."""
    return not file.startswith(_NOT_THE_USERS)


def first_line(error: BaseException) -> str:
    """What an error says, without torch's pages of text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _told(file: str, line: str, function: str, code: str) -> str:
    return f"{file}:{line}, in {function}: {code}" if code else f"{file}:{line}, in {function}"
