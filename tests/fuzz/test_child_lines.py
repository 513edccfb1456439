"""What a child process writes: the trainer's events and the model worker's answers.

A child runs a model's own code, or another version of ours. Whatever it writes, its parent gets a value or an error.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.model_worker.client import ModelWorker
from edge_client.trainer.client import TrainerProcess
from edge_client.trainer.protocol import Ready, TrainRequest
from fedepth import child as child_module
from fedepth.budget import Budget
from fedepth.child import Child
from fedepth.costs import Calibration
from fedepth.errors import ChildError, FedepthError
from tests.fuzz.damage import changed, damaged, fuzzing
from tests.fuzz.test_messages import PLAN, STAGE, VALUES

EVENTS: list[dict[str, Any]] = [
    {"event": "measure", "stage": 0, "held_bytes": 1, "baseline_bytes": 2, "baseline_anonymous_bytes": 3},
    {"event": "rehearsing"},
    {"event": "waiting", "stage": 0, "budget_bytes": 5},
    {
        "event": "progress",
        **{"stage": 0, "stage_count": 1, "first": 0, "last": 1, "epoch": 0, "epochs": 1, "loss": 0.5},
    },
    {"event": "stage_done", "result": vars(STAGE), "part": {"part": 0, "size_bytes": 1, "digest": "f"}},
    {"event": "failed", "outcome": "data", "message": "none"},
]
ANSWERS: list[dict[str, Any]] = [
    {"ok": {"accuracy": 0.5}},
    {"error": {"type": "ModelError", "message": "no"}},
    {"event": "progress", "text": "working"},
]
TASK = VALUES[4]
REQUEST = TrainRequest(TASK, PLAN, Budget(1, 1, (), 0, 0, 1.0, 0, 1), "g", Calibration(), "w", "d", "o", "c", "d", True)


class Written:
    """Stands in for a process that has written `data` and ended."""

    pid = 1
    returncode = None

    def __init__(self, data: bytes) -> None:
        self.stdin = self
        self.stdout = asyncio.StreamReader(limit=child_module.LINE_LIMIT_BYTES)
        self.stdout.feed_data(data)
        self.stdout.feed_eof()

    async def wait(self) -> int:
        return 0

    def write(self, data: bytes) -> None:
        pass

    async def drain(self) -> None:
        pass

    def close(self) -> None:
        pass

    def kill(self) -> None:
        pass


def child(data: bytes) -> Child:
    return Child("child", Written(data))  # type: ignore[arg-type]


async def events(data: bytes) -> None:
    trainer = TrainerProcess(child(data), Ready(start_bytes=1, allocator="malloc"))
    async for _ in trainer.train(REQUEST):
        pass


async def answers(data: bytes) -> None:
    worker = ModelWorker()
    worker._child = child(data)
    try:
        await worker.request("evaluate")
    finally:
        await worker.stop()


def ends_well(parse: Any, data: bytes) -> None:
    try:
        asyncio.run(parse(data))
    except FedepthError as error:
        assert len(str(error)) < 1000


@pytest.mark.parametrize(("parse", "good"), [(events, EVENTS), (answers, ANSWERS)], ids=["trainer", "model worker"])
def test_changed_and_damaged_lines(parse: Any, good: list[dict[str, Any]]) -> None:
    lines = b"\n".join(json.dumps(each).encode() for each in good)

    @fuzzing(150)
    @given(st.sampled_from(good).flatmap(changed).map(lambda each: json.dumps(each).encode()) | damaged(lines))
    def try_one(data: bytes) -> None:
        ends_well(parse, data + b"\n")

    try_one()


@pytest.mark.parametrize("parse", [events, answers], ids=["trainer", "model worker"])
@pytest.mark.parametrize(
    "line", [b"", b"\xff\n", b"[" * 100_000 + b"\n", b"1" * 10_000 + b"\n", b'{"ok": {}, "error": 3}\n', b"null\n"]
)
def test_lines_that_no_child_of_ours_writes(parse: Any, line: bytes) -> None:
    ends_well(parse, line)


def test_a_line_without_end_is_an_error_of_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "LINE_LIMIT_BYTES", 1000)

    async def scene() -> None:
        with pytest.raises(ChildError, match="wrote a line of over 1000 bytes"):
            await child(b"x" * 5000).receive()

    asyncio.run(scene())
