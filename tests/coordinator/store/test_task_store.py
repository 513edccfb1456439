"""Tasks, updates, devices and failures: acceptance is the row of the update, and every step may be repeated."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from coordinator.store import task_store
from coordinator.store.database import Database
from coordinator.store.records import EndedTask
from coordinator.store.tables import devices, failures, tasks
from fedepth.aggregation.rules import Norms
from fedepth.errors import StateError


def test_an_update_accepts_its_task_whatever_the_row_says(place: Any) -> None:
    store = place.open()
    for status in ("given", "lost", "failed"):
        task = place.task(1, status)
        place.add_update(store, task)
        store._database.write(tasks.update().where(tasks.c.task_id == task.task_id).values(status=status))
    assert {each.status for each in store.tasks_of(1)} == {"accepted"}
    assert store.task("t-0001-lost").status == "accepted"
    assert store.accepted_ids(1) == {"t-0001-given", "t-0001-lost", "t-0001-failed"}
    assert store.accepted_ids(2) == frozenset()
    store.close()


def test_a_task_with_an_update_does_not_change_any_more(place: Any) -> None:
    store = place.open()
    task = place.task(1)
    place.add_update(store, task)
    with pytest.raises(StateError, match="t-0001-a has an update"):
        store.record_task(replace(task, attempt=2))
    with pytest.raises(StateError, match="t-0001-a has an update"):
        store.record_step([], [EndedTask(task.task_id, "lost", "lost", "too late")])
    assert store.tasks_of(1) == [replace(task, status="accepted")]
    assert store.failure_counts() == {}
    store.close()


def test_a_step_is_recorded_whole_or_not_at_all(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = place.open()
    first, second = place.task(1, "a"), place.task(1, "b")
    store.record_step([first], [])
    with pytest.raises(StateError, match="t-0001-c is said to be lost, but was never handed out"):
        store.record_step(
            [second], [EndedTask("t-0001-a", "lost", "lost", "silent"), EndedTask("t-0001-c", "lost", "lost", "silent")]
        )
    assert store.tasks_of(1) == [first]
    assert store.failure_counts() == {}
    store.close()


def test_repeating_a_step_changes_nothing(place: Any) -> None:
    store = place.open()
    a, b, c = (place.task(1, device) for device in "abc")
    store.record_step([a, b], [])
    steps = [
        ([c], [EndedTask("t-0001-a", "failed", "declined", "no room")]),
        # Lost and handed out again in one step.
        ([replace(b, attempt=2)], [EndedTask("t-0001-b", "lost", "lost", "silent")]),
        ([], [EndedTask("t-0001-b", "lost", "lost", "silent again")]),
        ([], []),
    ]
    for given, ended in steps:
        store.record_step(given, ended)
        before = (store._database.rows(tasks.select()), store.failures())
        store.record_step(given, ended)
        assert (store._database.rows(tasks.select()), store.failures()) == before
    assert [(each.task_id, each.attempt, each.status) for each in store.tasks_of(1)] == [
        ("t-0001-a", 1, "failed"),
        ("t-0001-b", 2, "lost"),
        ("t-0001-c", 1, "given"),
    ]
    assert store.failure_counts() == {"failed/declined": 1, "lost/lost": 2}
    store.close()


def test_recording_an_update_twice_counts_once(place: Any) -> None:
    store = place.open()
    task = place.task(1)
    result = place.add_update(store, task, norms=Norms(2.0, 0.5))
    store.record_update(result, Norms(2.0, 0.5))
    assert store.updates_of(1) == [result]
    with pytest.raises(StateError, match="of task t-0001-a from a in round 1 is recorded"):
        store.record_update(replace(result, attempt=2), None)
    place.part(store, replace(task, task_id="another"))
    with pytest.raises(StateError, match="of task t-0001-a from a in round 1 is recorded"):
        store.record_update(replace(result, task_id="another"), None)
    assert store.update(task.task_id) == result
    assert store.update("another") is None
    store.close()


def test_an_update_whose_part_is_not_here_is_not_recorded(place: Any, kit: Any) -> None:
    store = place.open()
    task = place.task(1)
    store.record_task(task)
    place.part(store, task, b"par")
    with pytest.raises(StateError, match=r"part-0000\.safetensors is not here with its 4 bytes"):
        store.record_update(kit.result(task, {0: b"part"}), None)
    assert store.accepted_ids(1) == frozenset()
    store.close()


def test_norms_are_those_that_are_known(place: Any) -> None:
    store = place.open()
    known = {"c": Norms(3.0, 0.0), "a": Norms(1.5, 0.25), "b": None, "d": Norms(math.nan, 0.0)}
    for device, norms in known.items():
        place.add_update(store, place.task(1, device), norms=norms)
    place.add_update(store, place.task(2, "a"), norms=Norms(9.0, 0.0))
    assert store.norms_of(1) == [Norms(1.5, 0.25), Norms(3.0, 0.0)]
    store.close()


def test_failures_are_counted_by_kind_with_the_last(place: Any) -> None:
    store = place.open()
    store.record_task(place.task(1))
    store.record_step([], [EndedTask("t-0001-a", "refused", "shape", "wrong")])
    store.count_refusal("late", "too late", "unknown")
    store.count_refusal("late", "much too late", "x" * 500)
    for number in range(20):
        store.count_refusal(f"made up {number}", "m" * 5000, "t")
    assert store.failure_counts() == {"refused/late": 2, "refused/other": 20, "refused/shape": 1}
    late, other, _ = store.failures()
    assert (late.message, late.task_id) == ("much too late", "x" * 200)
    assert len(other.message) == 2000
    assert len(store._database.rows(failures.select())) == 3
    assert store.tasks_of(1)[0].status == "refused"
    store.close()


def test_devices_are_bounded_and_old_ones_make_room(place: Any, kit: Any) -> None:
    store = place.open()
    assert all(store.see_device(kit.report(name), 3) for name in "abc")
    assert store.see_device(kit.report("a"), 3)  # known
    assert not store.see_device(kit.report("d"), 3)
    old = devices.update().where(devices.c.device_id == "b")
    store._database.write(old.values(last_seen=devices.c.last_seen - task_store.FORGET_S - 1))
    assert store.see_device(kit.report("d"), 3)
    assert sorted(store.device_names()) == ["a", "c", "d"]
    store.close()


def test_an_acknowledged_update_survives_a_process_that_is_killed(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint, no clean close: the log is read at the next start."""
    store = plain.open()
    plain.add_round(store, 0)
    monkeypatch.setattr(Database, "checkpoint", lambda self: None)
    result = plain.add_update(store, plain.task(1))
    store._lock.close()  # as the kernel does; the connections stay open
    again = plain.open()
    assert again.updates_of(1) == [result]
    again.close()
    store.close()
