"""What all pictures have in common: how they are begun and written. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

# It would tell whoever has no home directory where it keeps its fonts.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from fedepth.errors import ConfigError  # noqa: E402
from fedepth.files import replacing  # noqa: E402
from fedepth.printable import printable  # noqa: E402


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches; no window belongs to it."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure in the format of its suffix, whole or not at all.

    Raises:
        ConfigError: the file cannot be written there.
    """
    to: Any
    try:
        with replacing(path) as to:
            figure.savefig(to, format=path.suffix.removeprefix(".").lower())
    except OSError as error:
        why = f"{error.strerror or error}; free some space there, or name another file"
        raise ConfigError(f"the picture cannot be written to {printable(str(path))}: {why}") from error
