"""Damaged updates against a real coordinator: refused by name, the round goes on, nothing of them is averaged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.outbox import Entry, part_name
from edge_client.transport import Accepted, GrpcTransport, Refused
from fedepth.budget import Budget
from fedepth.errors import FedepthError
from fedepth.files import file_digest
from fedepth.task import DeviceReport, PartInfo, Result, StageResult, Task
from fedepth.weights import load_numpy, save

Tensors = dict[str, Any]
GIB = 1 << 30


def report(device_id: str) -> DeviceReport:
    budget = Budget(8 * GIB, 8 * GIB, (), 0, 0, 1.0, 0, GIB)
    return DeviceReport(device_id, "", budget, 96, (*(10,) * 9, 6))


def result_for(task: Task, device: DeviceReport, part: Path) -> Result:
    stages = tuple(
        StageResult(s.first, s.last, s.micro_batch, 1, 1, 1, 1, GIB, 2.0, 1.0, 3, 96, 0.1) for s in task.plan.stages
    )
    units = tuple(unit for s in task.plan.stages for unit in range(s.first, s.last + 1))
    info = PartInfo(0, part.stat().st_size, file_digest(part))
    return Result(
        task.task_id, task.attempt, device.device_id, task.round, 96, task.plan, units, stages, (info,), 0.1, "none", 1
    )


async def offer(
    rig: Any, number: int, change: Callable[[Tensors], Tensors], *, lie: bool = False
) -> Accepted | Refused:
    """Takes a task as a new device and delivers the global weights, changed by `change`, as its update."""
    folder: Path = rig.folder
    device_id, identity = rig.lab.certificates.device(f"liar-{number}")
    transport = GrpcTransport(rig.lab.address, folder / f"liar-{number}", identity)
    try:
        device = report(device_id)
        task = await transport.next_task(device, 30)
        assert isinstance(task, Task)
        tensors = load_numpy(await transport.fetch_weights(task))
        part = folder / f"offer-{number}" / part_name(0)
        part.parent.mkdir(exist_ok=True)
        save(part, change(tensors))
        result = result_for(task, device, part)
        if lie:
            result = replace(result, parts=(replace(result.parts[0], digest="0" * 64),))
        return await transport.deliver(Entry(part.parent, result))
    finally:
        await transport.close()


def without_first(tensors: Tensors) -> Tensors:
    return dict(list(tensors.items())[1:])


def with_nan(tensors: Tensors) -> Tensors:
    name = next(iter(tensors))
    damaged = tensors[name].copy()
    damaged.flat[0] = np.nan
    return {**tensors, name: damaged}


def reshaped(tensors: Tensors) -> Tensors:
    name = next(iter(tensors))
    return {**tensors, name: tensors[name].reshape(-1, 1)}


def plus_one(tensors: Tensors) -> Tensors:
    return {name: tensor + 1 for name, tensor in tensors.items()}


def test_damaged_updates_are_refused_and_only_the_good_one_is_averaged(rig: Any) -> None:
    rig.start_coordinator(rig.job(devices=1, quorum=1))
    cases = (("missing_tensor", without_first), ("not_finite", with_nan), ("shape", reshaped))
    for number, (reason, change) in enumerate(cases):
        answer = asyncio.run(offer(rig, number, change))
        assert isinstance(answer, Refused) and answer.reason == reason
        assert rig.event("coordinator", "update_refused", device=f"liar-{number}")["reason"] == reason
    good = asyncio.run(offer(rig, 9, plus_one))
    assert good == Accepted(1)
    rig.event("coordinator", "round_closed", round=1)
    folder = rig.lab.coordinator_state / "weights"
    before, after = (load_numpy(next(folder.glob(f"round-{number:04d}-*"))) for number in (0, 1))
    for name in before:  # the mean of one update is that update
        np.testing.assert_array_equal(after[name], before[name] + 1)


def test_a_wrong_digest_never_reaches_the_average(rig: Any) -> None:
    rig.start_coordinator(rig.job(devices=1, quorum=1))
    with pytest.raises(FedepthError, match="sha256"):
        asyncio.run(offer(rig, 0, plus_one, lie=True))
    good = asyncio.run(offer(rig, 0, plus_one))
    assert good == Accepted(1)
