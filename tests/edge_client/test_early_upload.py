"""Blocks that are finished early: sent in order, given up without harm."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from structlog.testing import capture_logs

from edge_client.call_errors import UnreachableError
from edge_client.early_upload import EarlyUpload
from edge_client.transport import Part, Refused, Transport
from fedepth.task import PartInfo, Task

Answer = Refused | Exception | None


class Sends:
    """The one call of a transport that early uploads need."""

    def __init__(self, answers: list[Answer]) -> None:
        self.answers = answers
        self.sent: list[int] = []
        self.done = asyncio.Event()
        self.cut = False

    async def send_part(self, part: Part) -> Refused | None:
        self.sent.append(part.info.part)
        answer = self.answers.pop(0)
        if not self.answers:
            self.done.set()
        if isinstance(answer, TimeoutError):  # an upload that goes on until it is cut
            try:
                await asyncio.Event().wait()
            finally:
                self.cut = True
        if isinstance(answer, Exception):
            raise answer
        return answer


def upload(tmp_path: Path, task: Task, answers: list[Answer], parts: int = 3) -> Sends:
    async def scene() -> Sends:
        sends = Sends(list(answers))
        async with EarlyUpload(cast(Transport, sends), task, "device", task.plan, tmp_path) as early:
            for number in range(parts):
                early.add(PartInfo(number, 10, "0" * 64))
            await asyncio.wait_for(sends.done.wait(), 10)
            await asyncio.sleep(0)
        return sends

    return asyncio.run(scene())


def test_parts_go_up_in_order_and_one_that_fails_is_left_to_the_update(
    tmp_path: Path, make_task: Callable[..., Any]
) -> None:
    assert upload(tmp_path, make_task(), [None, UnreachableError("away"), None]).sent == [0, 1, 2]


def test_nothing_more_is_sent_once_a_part_was_refused(tmp_path: Path, make_task: Callable[..., Any]) -> None:
    assert upload(tmp_path, make_task(), [Refused("late", "round 1 is closed")]).sent == [0]


def test_what_is_on_its_way_when_the_training_ends_is_cut(tmp_path: Path, make_task: Callable[..., Any]) -> None:
    sends = upload(tmp_path, make_task(), [None, TimeoutError()])
    assert sends.sent == [0, 1] and sends.cut


def test_an_error_that_nobody_expects_is_told_and_does_not_reach_the_training(
    tmp_path: Path, make_task: Callable[..., Any]
) -> None:
    with capture_logs() as logs:
        assert upload(tmp_path, make_task(), [OSError("bad card")]).sent == [0]
    assert [line["log_level"] for line in logs] == ["error"]
