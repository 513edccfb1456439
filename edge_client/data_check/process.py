"""What runs in a data check: `python -m edge_client.data_check.process`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edge_client.data_check.protocol import Checked, CheckFailed, CheckProgress, CheckRequest, Event, RowRequest
from fedepth.child import run_child
from fedepth.data.check import check_data
from fedepth.data.rows import check_rows
from fedepth.errors import DataError, DiskError
from fedepth.files import disk_errors

PROGRESS_S = 2.0


def main() -> None:
    # The protocol keeps the real standard output; whatever a library prints goes to standard error.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        told = time.monotonic()

        def send(event: Event) -> None:
            answers.write(msgspec.json.encode(event) + b"\n")
            answers.flush()

        def progress(files: int) -> None:
            nonlocal told
            if time.monotonic() - told >= PROGRESS_S:
                told = time.monotonic()
                send(CheckProgress(files))

        message = msgspec.json.decode(sys.stdin.buffer.readline(), type=dict[str, Any])
        if "source" in message:
            send(answer(msgspec.convert(message, RowRequest), progress))
        else:
            send(answer(msgspec.convert(message, CheckRequest), progress))


def answer(request: CheckRequest | RowRequest, progress: Callable[[int], None]) -> Checked | CheckFailed:
    """Carries out one request."""
    try:
        if isinstance(request, RowRequest):
            with disk_errors("the data cannot be checked", Path(request.source)):
                return Checked(
                    rows=check_rows(Path(request.source), Path(request.record), request.model, on_progress=progress)
                )
        with disk_errors("the data cannot be checked", Path(request.directory)):
            found = check_data(
                Path(request.directory), Path(request.record), decode=request.decode, on_progress=progress
            )
    except (DataError, DiskError) as error:
        return CheckFailed(str(error))
    return Checked(found if found.unsaved else None)


if __name__ == "__main__":
    run_child(main)
