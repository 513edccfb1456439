"""`fedepth` with devices that forget what int8 leaves out: the control of benchmarks.encodings, which starts it. No job
can ask for this."""

from __future__ import annotations

import shutil
from pathlib import Path

from fedepth.cli import main
from fedepth.residuals import Residuals


def forget(self: Residuals, left: Path) -> None:
    """In place of `Residuals.keep`."""
    shutil.rmtree(left, ignore_errors=True)


if __name__ == "__main__":
    Residuals.keep = forget  # type: ignore[method-assign]
    main()
