"""Clones of one identity, told from an agent that was started again."""

from __future__ import annotations

from coordinator.instances import KEPT_DEVICES, SILENT_S, Caller, Instances


def caller(instance: str, host: str = "porch") -> Caller:
    return Caller(instance, host, "ipv4:10.0.0.7:4242")


def test_an_agent_that_was_started_again_takes_its_own_place() -> None:
    instances = Instances()
    for instance in ("one", "one", "two", "two", "three"):
        assert instances.rival("device", caller(instance)) is None


def test_of_two_that_live_the_older_is_refused_and_the_other_named() -> None:
    instances = Instances()
    assert instances.rival("device", caller("one")) is None
    clone = caller("two", "garage")
    assert instances.rival("device", clone) is None
    for _ in range(3):
        assert instances.rival("device", caller("one")) == clone
        assert instances.rival("device", clone) is None
    assert clone.place == "garage (ipv4:10.0.0.7:4242)"


def test_of_three_that_live_one_is_left() -> None:
    instances = Instances()
    for instance in ("one", "two", "three"):
        assert instances.rival("device", caller(instance)) is None
    refused = [instances.rival("device", caller(instance)) is not None for instance in ("one", "two", "three")]
    assert refused == [True, True, False]


def test_other_devices_and_agents_without_an_instance_are_not_touched() -> None:
    instances = Instances()
    assert instances.rival("a", caller("one")) is None
    assert instances.rival("b", caller("two")) is None
    assert instances.rival("a", caller("")) is None
    assert instances.rival("a", caller("one")) is None


def test_strangers_do_not_fill_the_memory() -> None:
    instances = Instances()
    for number in range(KEPT_DEVICES + 10):
        instances.rival(f"device-{number}", caller("one"))
    assert len(instances._known) == KEPT_DEVICES


def test_the_older_is_served_again_once_the_other_is_gone() -> None:
    now = [0.0]
    instances = Instances(lambda: now[0])
    for instance in ("one", "two"):
        assert instances.rival("device", caller(instance)) is None
    now[0] = SILENT_S - 1
    assert instances.rival("device", caller("one")) is not None
    now[0] = SILENT_S
    assert instances.rival("device", caller("one")) is None
    assert instances.rival("device", caller("two")) is not None
