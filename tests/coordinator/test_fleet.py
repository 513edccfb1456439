"""Who calls: recorded when it says something new, and bounded in number."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.fleet import RECORD_S, Fleet, Refusal
from coordinator.observe.events import Events
from coordinator.store.records import Store
from fedepth.job import model_spec
from fedepth.task import DeviceReport

PEER = "ipv4:10.0.0.7:4242"


class Rig:
    def __init__(self, folder: Path, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kit = kit
        self.now = 0.0
        self.store = Store.open(folder, "demo", model_spec(kit.config()))
        self.fleet = Fleet(self.store, Events(), 2, lambda: self.now)
        self.recorded: list[str] = []
        record = self.store.see_device

        def recording(report: Any, most: int) -> bool:
            self.recorded.append(report.device_id)
            return record(report, most)

        monkeypatch.setattr(self.store, "see_device", recording)

    def see(self, report: DeviceReport) -> Refusal | None:
        return asyncio.run(self.fleet.see(report, PEER))


@pytest.fixture
def rig(tmp_path: Path, kit: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(tmp_path, kit, monkeypatch)
    yield made
    made.store.close()


def test_a_poll_that_says_nothing_new_writes_nothing(rig: Rig) -> None:
    for megabytes in range(100, 150):  # what is free changes with every poll
        assert rig.see(rig.kit.report("a", megabytes << 20)) is None
    assert rig.recorded == ["a"]
    rig.now = RECORD_S
    rig.see(rig.kit.report("a"))
    rig.see(replace(rig.kit.report("a"), name="porch"))
    assert rig.recorded == ["a"] * 3
    assert rig.fleet.name("a") == "porch"


def test_a_clone_that_asks_again_and_again_is_told_of_within_a_bound(
    tmp_path: Path, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, kit, monkeypatch)
    sent: list[str] = []
    monkeypatch.setattr(Events, "send", lambda events, kind, **more: sent.append(kind))
    report = rig.kit.report("a")
    assert rig.see(replace(report, instance="one")) is None
    assert rig.see(replace(report, instance="two")) is None
    for _ in range(50):
        refused = rig.see(replace(report, instance="one"))
        assert refused is not None and refused.reason == "clone"
    assert sent.count("cloned_identity") == 20
    rig.now = 10.0
    rig.see(replace(report, instance="one"))
    assert sent.count("cloned_identity") == 21
    rig.store.close()


def test_a_device_is_told_with_the_classes_that_it_lacks(
    tmp_path: Path, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Any]] = []
    events = Events()
    monkeypatch.setattr(events, "send", lambda event, **fields: sent.append(fields))
    model = model_spec(kit.config())
    store = Store.open(tmp_path, "demo", model)
    fleet = Fleet(store, events, 2, model=model)
    report = replace(kit.report("a"), class_names=model.classes[:2], class_counts=(20, 0))
    assert asyncio.run(fleet.see(report, PEER)) is None
    store.close()
    assert sent[0]["lacking"] == model.classes[1:]


def test_a_device_more_than_the_job_takes_is_refused_with_the_number(rig: Rig) -> None:
    assert rig.see(rig.kit.report("a")) is None
    assert rig.see(rig.kit.report("b")) is None
    refusal = rig.see(rig.kit.report("c"))
    assert refusal is not None and "2 devices that it takes; to admit more, raise [limits] devices" in refusal.message
    assert rig.see(rig.kit.report("a")) is None
    assert rig.fleet.name("b") == "board b"
    assert rig.fleet.name("c") == "c"
