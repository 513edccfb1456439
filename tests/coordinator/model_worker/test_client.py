"""The handle on the model worker, against small children that need no torch."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from coordinator.model_worker import client
from coordinator.model_worker.client import ModelWorker
from fedepth import child
from fedepth.errors import ChildError, ModelError

CHILD = """
import json, os, signal, sys
def say(**message):
    print(json.dumps(message), flush=True)
say(event="ready")
for line in sys.stdin:
    request = json.loads(line)
    do = request["do"]
    if do == "pid":
        say(event="progress", text="thinking")
        say(ok={"pid": os.getpid(), "echo": request.get("value")})
    elif do == "refuse":
        say(error={"type": request["kind"], "message": "no such model"})
    elif do == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif do == "die":
        os._exit(3)
    else:
        say(event="nonsense")
"""


def worker(idle_s: float = 60.0, said: list[str] | None = None, code: str = CHILD) -> ModelWorker:
    told = said if said is not None else []
    return ModelWorker([sys.executable, "-c", code], idle_s, told.append)


def test_requests_share_one_child_that_stop_ends() -> None:
    async def scene() -> None:
        said: list[str] = []
        models = worker(said=said)
        assert not models.running
        first, second = await asyncio.gather(models.request("pid", value=1), models.request("pid", value=2))
        assert first["pid"] == second["pid"]
        assert (first["echo"], second["echo"]) == (1, 2)
        assert said == ["thinking", "thinking"]
        assert models.running
        await models.stop()
        assert not models.running

    asyncio.run(scene())


def test_an_idle_child_ends_and_the_next_request_starts_another() -> None:
    async def scene() -> None:
        models = worker(idle_s=0.0)
        first = await models.request("pid")
        while models.running:
            await asyncio.sleep(0)
        second = await models.request("pid")
        assert first["pid"] != second["pid"]
        await models.stop()

    asyncio.run(scene())


def test_errors_come_back_as_the_class_they_name() -> None:
    async def scene() -> None:
        models = worker()
        with pytest.raises(ModelError, match=r"^no such model$"):
            await models.request("refuse", kind="ModelError")
        with pytest.raises(ChildError, match="KeyError: no such model"):
            await models.request("refuse", kind="KeyError")
        assert (await models.request("pid", value=7))["echo"] == 7
        await models.stop()

    asyncio.run(scene())


@pytest.mark.parametrize(("do", "message"), [("die", "ended with status 3"), ("else", "nonsense")])
def test_a_broken_child_is_told_and_replaced(do: str, message: str) -> None:
    async def scene() -> None:
        models = worker()
        with pytest.raises(ChildError, match=message):
            await models.request(do)
        assert not models.running
        assert (await models.request("pid", value=1))["echo"] == 1
        await models.stop()

    asyncio.run(scene())


def test_a_child_that_does_not_begin_with_ready_is_told() -> None:
    async def scene() -> None:
        models = worker(code="print('{}', flush=True)")
        with pytest.raises(ChildError, match="instead of ready"):
            await models.request("pid")
        assert not models.running

    asyncio.run(scene())


def test_a_child_that_hangs_is_killed_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        models = worker()
        first = await models.request("pid")
        with monkeypatch.context() as patched:
            patched.setattr(child, "IDLE_SHARE", 0.1)
            patched.setattr(child, "HANG_S", 0.2)
            with pytest.raises(ChildError, match=rf"pid {first['pid']}\) has said nothing for 0\.2 s"):
                await models.request("stop")
        assert not models.running
        with pytest.raises(ProcessLookupError):  # not even a stopped one
            os.kill(first["pid"], 0)
        assert (await models.request("pid", value=1))["echo"] == 1
        await models.stop()

    asyncio.run(scene())


def test_a_child_that_is_stopped_before_it_is_ready_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "START_S", 0.1)

    async def scene() -> None:
        models = worker(code="import time; time.sleep(60)")
        with pytest.raises(ChildError, match=r"was not ready after 0\.1 s"):
            await models.request("pid")
        assert not models.running

    asyncio.run(scene())
