"""Where in a user's code something happened: the file and line that a message names."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import PythonKeyTracer

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)(?:\n\s+(\S[^\n]*))?')
_NOT_THE_USERS = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[1]}/", "<frozen", "<string>", "<eval")


def _is_own(file: str) -> bool:
    """Whether code in this file is the user's own, rather than of torch, this package, Python, or an installed one."""
    installed = "/site-packages/" in file or "/lib/python" in file
    return not file.startswith(_NOT_THE_USERS) and not installed


@contextmanager
def own_frames_kept() -> Iterator[None]:
    """Within the block, torch.export records of where an operator came from the innermost frame of the user's own code,
    or of an installed package's; left alone it keeps frames of functions that are named forward, and no helper's."""

    def outside_torch(_: fx.Tracer, summary: traceback.StackSummary) -> traceback.StackSummary:
        start = next((at for at, frame in enumerate(summary) if frame.name == "forward"), len(summary))
        frames = [frame for frame in summary[start:] if is_users(frame.filename)]
        own = [frame for frame in frames if _is_own(frame.filename)]
        return traceback.StackSummary.from_list((own or frames)[-1:])

    before = PythonKeyTracer._filter_traceback_frames
    PythonKeyTracer._filter_traceback_frames = outside_torch  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        PythonKeyTracer._filter_traceback_frames = before  # type: ignore[method-assign]


def user_line(node: fx.Node) -> str:
    """The innermost line of the user's own code that a node of a graph comes from, or of an installed package's."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or _inner_trace(node))
    theirs = [frame for frame in frames if is_users(frame[0])]
    own = [frame for frame in theirs if _is_own(frame[0])]
    return _told(*(own or theirs)[-1]) if theirs else f"operator {node.name}"


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
    """The innermost line of the user's own code that an error went through, or of an installed package's; empty if
    there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename)]
    own = [frame for frame in frames if _is_own(frame.filename)]
    installed = [frame for frame in frames if "/site-packages/" in frame.filename]
    if not (own or installed):
        return ""
    frame = (own or installed)[-1]
    return _told(frame.filename, str(frame.lineno), frame.name, frame.line or "")


def is_users(file: str) -> bool:
    """Whether code in this file is neither torch's nor this package's."""
    return not file.startswith(_NOT_THE_USERS)


def first_line(error: BaseException) -> str:
    """What an error says, without torch's pages of text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _told(file: str, line: str, function: str, code: str) -> str:
    return f"{file}:{line}, in {function}: {code}" if code else f"{file}:{line}, in {function}"
