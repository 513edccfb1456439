"""Worker processes, played by a script that needs no torch."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from fedepth.errors import ChildError
from fedepth.simulation import engine
from fedepth.simulation.engine import LocalEngine
from fedepth.simulation.worker.protocol import Evaluate, Open
from fedepth.task import ModelSpec

WORKER = """
import json, os, sys
print(json.dumps({"event": "ready"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("weights", "").startswith("/"):  # die once, or always
        if asked["weights"] == "/always" or not os.path.exists(asked["weights"]):
            if asked["weights"] != "/always":
                open(asked["weights"], "w").close()
            os._exit(9)
    if asked.get("weights") == "over":
        print(json.dumps({"error": {"type": "OverBudgetError", "message": "m", "outcome": "over_budget"}}), flush=True)
        continue
    print(json.dumps({"ok": {"tests": 3, "asked": asked, "pid": os.getpid()}, "cpu_seconds": 0.5}), flush=True)
"""
OPEN = Open("digits", ModelSpec("x", ("a",), (1, 2, 2), (), ()), "graph", "partition", "", "scratch")


def with_engine(
    monkeypatch: pytest.MonkeyPatch, work: Callable[[LocalEngine], Awaitable[Any]], workers: int = 2
) -> tuple[Any, LocalEngine, list[str]]:
    said: list[str] = []
    monkeypatch.setattr(engine, "WORKER_ARGV", (sys.executable, "-c", WORKER))

    async def run() -> tuple[Any, LocalEngine]:
        running = LocalEngine(workers, 1, said.append)
        try:
            assert await running.start(OPEN) == 3
            return await work(running), running
        finally:
            await running.close()

    return *asyncio.run(run()), said


def test_requests_are_answered_by_all_workers_the_longest_first_and_fillers_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work(running: LocalEngine) -> list[str]:
        order: list[str] = []

        async def ask(name: str, **how: Any) -> None:
            answer = await running.ask(Evaluate(name, 0, 1), **how)
            assert answer["ok"]["asked"] == {"do": "evaluate", "weights": name, "first": 0, "last": 1}
            order.append(name)

        asked = [("filler", {"filler": True, "work": 9.0}), ("short", {"work": 1.0}), ("long", {"work": 2.0})]
        await asyncio.gather(*(ask(name, **how) for name, how in asked))
        return order

    order, running, said = with_engine(monkeypatch, work, workers=1)
    assert order == ["long", "short", "filler"] and said == []
    assert running.cpu_seconds == {"evaluate": 1.5} and running.busy_seconds > 0 and running.pids == ()


def test_a_worker_that_dies_is_replaced_and_its_request_asked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def work(running: LocalEngine) -> Any:
        before = set(running.pids)
        answer = await running.ask(Evaluate(str(tmp_path / "died"), 0, 1))
        return answer["ok"]["pid"] not in before and len(before) == 2

    replaced, _, said = with_engine(monkeypatch, work)
    assert replaced and len(said) == 1 and "ended with status 9; another one takes its place" in said[0]


def test_what_workers_die_of_again_is_told_and_they_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(running: LocalEngine) -> Any:
        with pytest.raises(ChildError, match="ended with status 9"):
            await running.ask(Evaluate("/always", 0, 1))
        return await running.ask(Evaluate("sound", 0, 1))

    answer, _, said = with_engine(monkeypatch, work, workers=1)
    assert answer["ok"]["asked"]["weights"] == "sound" and len(said) == 2


def test_a_worker_that_met_its_limit_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It could be unable to compile another kernel (fedepth.training.limits)."""

    async def work(running: LocalEngine) -> Any:
        (before,) = running.pids
        answer = await running.ask(Evaluate("over", 0, 1))
        assert answer["error"]["outcome"] == "over_budget"
        return (await running.ask(Evaluate("next", 0, 1)))["ok"]["pid"] != before

    replaced, _, said = with_engine(monkeypatch, work, workers=1)
    assert replaced and said == []
