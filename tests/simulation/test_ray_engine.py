"""Which actor answers what, with a cluster that is played. A real one: tests/integration/test_simulation.py."""

from __future__ import annotations

import asyncio
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from fedepth.errors import ChildError
from fedepth.simulation.engine import TRIES
from fedepth.simulation.ray_engine import RayEngine
from fedepth.simulation.worker.protocol import Evaluate, Open
from fedepth.task import ModelSpec

OPEN = Open("digits", ModelSpec("x", ("a",), (1, 2, 2), (), ()), "graph", "partition", "", "scratch")


class Lost(Exception):
    """What Ray raises of an actor that is gone."""


class Cluster:
    """As much of Ray as the engine asks of it. Actors are numbered as they are started."""

    def __init__(self, broken: frozenset[int] = frozenset()) -> None:
        """`broken`: actors that are lost as soon as they are asked."""
        self.exceptions = SimpleNamespace(RayError=Lost)
        self.started = 0
        self.killed: list[int] = []
        self._broken = broken

    def is_initialized(self) -> bool:
        return True

    def remote(self, actor: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._start))

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.number)

    def _start(self) -> Any:
        self.started += 1
        number = self.started

        async def answer(line: bytes) -> bytes:
            asked = json.loads(line)
            if number in self._broken:
                raise Lost(f"actor {number} is gone")
            if asked.get("weights") == "over":
                return json.dumps({"error": {"message": "m", "outcome": "over_budget"}}).encode()
            return json.dumps({"ok": {"tests": 3, "actor": number}}).encode()

        return SimpleNamespace(number=number, answer=SimpleNamespace(remote=answer))


def answers(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, *weights: str) -> list[Any]:
    """What one worker answers to requests one after the other; errors as they are."""
    monkeypatch.setitem(sys.modules, "ray", cluster)

    async def run() -> list[Any]:
        engine = RayEngine(1, 1)
        await engine.start(OPEN)
        try:
            found: list[Any] = []
            for each in weights:
                asked = engine.ask(Evaluate(each, 0, 1))
                found += await asyncio.gather(asyncio.wait_for(asked, 10), return_exceptions=True)
            return found
        finally:
            await engine.close()

    return asyncio.run(run())


def test_an_actor_that_met_its_limit_is_replaced_and_its_answer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    first, over, after = answers(cluster, monkeypatch, "a", "over", "b")
    assert (first["ok"]["actor"], over["error"]["outcome"], after["ok"]["actor"]) == (1, "over_budget", 2)
    assert cluster.killed == [1, 2]  # the second as the engine closes


def test_no_request_waits_for_ever_where_no_other_actor_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(broken=frozenset(range(2, 2 + 2 * TRIES)))
    over, gone, again, back = answers(cluster, monkeypatch, "over", "a", "b", "c")
    assert over["error"]["outcome"] == "over_budget"
    assert all(isinstance(error, ChildError) and "is gone" in str(error) for error in (gone, again))
    assert back["ok"]["actor"] == 2 + 2 * TRIES
