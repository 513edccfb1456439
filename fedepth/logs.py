"""How the programs log: one line per event, with its level and time, from a level on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import structlog


def configure_logs(
    renderer: structlog.types.Processor, loggers: Callable[..., Any] | None = None, level: int = logging.INFO
) -> None:
    """Sends all log lines from `level` on to standard error, or to what `loggers` makes."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=loggers or structlog.PrintLoggerFactory(sys.stderr),
    )
