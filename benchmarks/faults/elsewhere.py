"""Scenarios of state that lies elsewhere than on a roomy disk: in PostgreSQL, in a bucket, on a disk that is full."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.faults.evidence import entries, told
from benchmarks.faults.outside import BucketService, PostgresServer, SmallDisk
from benchmarks.faults.scenario import LIMIT_S, Kind, Scene, recover

DISK_BYTES = 120 << 20  # more than a coordinator and an agent keep in reserve
_DEVICE = "device-0"


def kinds() -> Iterator[Kind]:
    """Every kind of this module."""
    for mode in ("fast", "immediate"):
        name = {"fast": "restarted", "immediate": "killed"}[mode]
        yield Kind(f"PostgreSQL is {name}", _database_away(mode), False, rounds=8, outside=PostgresServer)
    yield Kind("the bucket is away for a while", _bucket_away, False, rounds=8, outside=BucketService)
    yield Kind(
        "a full disk: coordinator",
        _coordinator_full,
        False,
        rounds=8,
        outside=lambda: SmallDisk("coordinator", DISK_BYTES),
    )
    yield Kind(
        "a full disk: agent",
        _agent_full,
        False,
        times=1,
        rounds=1_000_000,
        real_trainers=True,
        ends=False,
        job={"epochs": 3},
        outside=lambda: SmallDisk(_DEVICE, DISK_BYTES),
    )


def _in_a_round(scene: Scene) -> None:
    """Waits for a moment somewhere in a round."""
    scene.federation.wait_rounds(2, 2 * LIMIT_S)
    time.sleep(scene.chance.uniform(0, 1.5))


def _database_away(mode: str) -> Callable[[Scene], None]:
    def play(scene: Scene) -> None:
        server = scene.federation.outside
        assert isinstance(server, PostgresServer)
        _in_a_round(scene)
        server.stop(mode)
        scene.fired += 1
        away_s = scene.chance.uniform(0, 6)
        time.sleep(away_s)
        server.start()
        scene.say(f"the server stopped ({mode}) in round {scene.federation.round()} and came back after {away_s:.1f} s")
        recover(scene)

    return play


def _bucket_away(scene: Scene) -> None:
    service = scene.federation.outside
    assert isinstance(service, BucketService)
    _in_a_round(scene)
    service.stop()
    scene.fired += 1
    away_s = scene.chance.uniform(3, 8)
    time.sleep(away_s)
    service.start()
    scene.say(f"the bucket could not be reached for {away_s:.1f} s")
    recover(scene)


def _coordinator_full(scene: Scene) -> None:
    """Nobody is given a task, and nothing is lost, until there is room."""
    federation = scene.federation
    disk = federation.outside
    assert isinstance(disk, SmallDisk)
    _in_a_round(scene)
    with disk.full():
        scene.fired += 1
        full_s = scene.chance.uniform(4, 10)
        time.sleep(full_s)
        begun = federation.round()
        time.sleep(2)
        if federation.round() > begun + 1:
            scene.fail("rounds go on although nothing can be written")
    scene.say(f"the coordinator's disk was full for {full_s + 2:.1f} s")
    recover(scene)


def _agent_full(scene: Scene) -> None:
    """The device says so, fails nothing, and takes part again when there is room."""
    federation = scene.federation
    disk = federation.outside
    assert isinstance(disk, SmallDisk)

    def said(event: str) -> list[dict[str, Any]]:
        return [each for each in entries(federation.journal(_DEVICE)) if event in str(each.get("event", ""))]

    def accepted() -> int:
        return sum(each.accepted for each in told(federation, _DEVICE))

    federation.wait_until(accepted, 2 * LIMIT_S, f"{_DEVICE} trains nothing")
    received = len(said("task received"))
    federation.wait_until(lambda: len(said("task received")) > received, LIMIT_S, f"{_DEVICE} has no other task")
    time.sleep(scene.chance.uniform(0, 0.5))
    before = accepted()
    with disk.full():
        scene.fired += 1
        federation.wait_until(
            lambda: said("waits for the disk") or said("cannot be stored") or said("asking for no task"),
            LIMIT_S,
            f"{_DEVICE} does not say that its disk is full",
        )
        federation.wait_rounds(federation.round(), LIMIT_S)  # the others go on
    scene.say(f"{_DEVICE}: its disk was full")
    federation.wait_until(lambda: accepted() > before, 2 * LIMIT_S, f"{_DEVICE} takes no part any more")
    for failure in said("task ended without an update"):
        scene.fail(f"{_DEVICE} counts a full disk as its failure: {failure.get('outcome')}: {failure.get('message')}")
    recover(scene)
