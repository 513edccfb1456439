"""How the coordinator's log lines look: those of every program, with events in words."""

from __future__ import annotations

import structlog

from coordinator.observe.words import in_words
from fedepth import logs


def renderer(json_lines: bool) -> structlog.types.Processor:
    """What turns an event into a line on standard error."""
    return logs.renderer(json_lines, in_words)
