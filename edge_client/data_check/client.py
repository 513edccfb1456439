"""The data check as the agent sees it: a child process that looks at image files and is gone afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_client.data_check.protocol import Checked, CheckFailed, CheckRequest, Event
from fedepth.child import Child, module_argv
from fedepth.data.damage import Damage, load_damage
from fedepth.errors import ChildError, DataError


async def check_files(request: CheckRequest, on_progress: Callable[[int], None]) -> Damage:
    """Runs one check to its end; `on_progress` hears every two seconds how many files were gone through.

    Raises:
        DataError: the directory cannot be read.
        ChildError: the check ended without an answer.
    """
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
                return event.damage or load_damage(Path(request.record))
            on_progress(event.files)
        raise ChildError("the data check ended without an answer")
    finally:
        child.kill()
        await child.stop()
