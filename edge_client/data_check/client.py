"""The data check as the agent sees it: a child process that looks at image files or rows and is gone afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_client.data_check.protocol import Checked, CheckFailed, CheckRequest, Event, RowRequest
from fedepth.child import Child, module_argv
from fedepth.data.damage import Damage, RowCheck, load_damage
from fedepth.errors import ChildError, DataError


async def check_files(request: CheckRequest, on_progress: Callable[[int], None]) -> Damage:
    """Runs one check of image files to its end; `on_progress` hears every two seconds how many were gone through.

    Raises:
        DataError: the directory cannot be read.
        ChildError: the check ended without an answer.
    """
    checked = await _checked(request, on_progress)
    return checked.damage or load_damage(Path(request.record))


async def check_rows(request: RowRequest, on_progress: Callable[[int], None]) -> RowCheck:
    """The same of the rows of files.

    Raises:
        DataError: a file cannot be read, or has not the job's columns.
        ChildError: the check ended without an answer.
    """
    checked = await _checked(request, on_progress)
    if checked.rows is None:
        raise ChildError("the data check told nothing of the rows")
    return checked.rows


async def _checked(request: CheckRequest | RowRequest, on_progress: Callable[[int], None]) -> Checked:
    try:
        child = await Child.start("data check", module_argv("edge_client.data_check.process"))
    except OSError as error:
        raise ChildError(f"the data check cannot be started: {error.strerror or error}") from error
    try:
        await child.send(request)
        async for message in child.messages():
            try:
                event: Event = msgspec.convert(message, Event)
            except msgspec.ValidationError as error:
                raise ChildError(f"the data check (pid {child.pid}) wrote what nobody knows: {error}") from None
            if isinstance(event, CheckFailed):
                raise DataError(event.message)
            if isinstance(event, Checked):
                return event
            on_progress(event.files)
        raise ChildError("the data check ended without an answer")
    finally:
        child.kill()
        await child.stop()
