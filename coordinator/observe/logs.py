"""How the coordinator's log lines look: colours on a terminal, else key=value, or JSON if asked for."""

from __future__ import annotations

import sys

import structlog


def renderer(json_lines: bool) -> structlog.types.Processor:
    """What turns an event into a line on standard error."""
    if json_lines:
        return structlog.processors.JSONRenderer()
    if sys.stderr.isatty():
        return structlog.dev.ConsoleRenderer()
    return structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False)
