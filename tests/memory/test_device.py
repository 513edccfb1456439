"""What counts and what holds on a GPU. A stand-in for torch.cuda: the unified one was NEVER RUN ON HARDWARE.

Free and total bytes, reserved bytes and the per-process fraction mean what PyTorch's documentation of torch.cuda says
of mem_get_info, memory_reserved, max_memory_reserved and set_per_process_memory_fraction.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedepth.memory import device as device_module
from fedepth.memory.device import bounded, held_bytes, host_overhead_bytes, kernels_bytes, new_meter, peak_bytes, reset

MIB = 1 << 20
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Gpu:
    """8,000 MiB, of which 1,000 are free and this process has reserved 200 and at most 300. As torch does, it takes a
    fraction for a numbered device only."""

    def __init__(self, *, integrated: bool) -> None:
        self.integrated = integrated
        self.fractions: list[float] = []
        self.done: list[str] = []

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(is_integrated=int(self.integrated))

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 1000 * MIB, 8000 * MIB

    def memory_reserved(self, device: torch.device) -> int:
        return 200 * MIB

    def max_memory_reserved(self, device: torch.device) -> int:
        return 300 * MIB

    def set_per_process_memory_fraction(self, fraction: float, device: torch.device) -> None:
        if device.index is None:
            raise ValueError("Expected a torch.device with a specified index")
        self.fractions.append(fraction)

    def synchronize(self, device: torch.device) -> None:
        self.done.append("waited")

    def empty_cache(self) -> None:
        self.done.append("emptied")

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.done.append("reset")


class Host:
    """A meter of host memory. The GPU's workspaces held 32 MiB at its baseline."""

    def __init__(self, peak_bytes: int) -> None:
        self.baseline = SimpleNamespace(reserved_bytes=32 * MIB)
        self.peak_bytes = peak_bytes
        self.held_bytes = 50 * MIB
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture(params=[False, True], ids=["discrete", "unified"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu(integrated=request.param)
    monkeypatch.setattr(device_module.torch, "cuda", found)
    return found


def test_the_budget_is_what_the_gpu_has_free_and_its_allocator_is_held_to_it(gpu: Gpu) -> None:
    # A discrete GPU: nine tenths of what is free, and what this process has reserved since its baseline. A unified one
    # shares the system's memory, and what its driver calls free is not all that is.
    expected = 5000 * MIB if gpu.integrated else (900 + 200 - 32) * MIB
    meter: Any = Host(0)
    assert bounded(5000 * MIB, meter, CUDA, enforce=True) == expected
    assert bounded(400 * MIB, meter, CUDA, enforce=True) == 400 * MIB
    # The limit counts what was reserved before the baseline, the budget does not.
    assert gpu.fractions == [(expected + 32 * MIB) / (8000 * MIB), 432 / 8000]
    assert bounded(16_000 * MIB, meter, CUDA, enforce=True) >= expected and gpu.fractions[-1] <= 1.0


def test_nothing_is_held_to_a_budget_that_is_not_enforced(gpu: Gpu) -> None:
    assert bounded(400 * MIB, Host(0), CUDA, enforce=False) == 400 * MIB  # type: ignore[arg-type]
    assert gpu.fractions == [1.0]


def test_a_new_meter_begins_with_what_a_gpu_holds_for_good(gpu: Gpu) -> None:
    assert new_meter(CUDA).baseline.reserved_bytes == 200 * MIB and gpu.done == ["waited", "emptied"]
    assert new_meter(CPU).baseline.reserved_bytes == 0


def test_a_gpus_driver_may_load_kernels_into_the_hosts_memory() -> None:
    assert kernels_bytes(CPU) == 0
    assert host_overhead_bytes(MIB, CUDA) - host_overhead_bytes(MIB, CPU) == kernels_bytes(CUDA) > 0


def test_on_a_cpu_nothing_is_asked_of_a_gpu(gpu: Gpu) -> None:
    assert bounded(5000 * MIB, Host(0), CPU, enforce=True) == 5000 * MIB  # type: ignore[arg-type]
    assert peak_bytes(Host(70 * MIB), CPU) == 70 * MIB  # type: ignore[arg-type]
    reset(host := Host(0), CPU)  # type: ignore[arg-type]
    assert host.resets == 1 and gpu.fractions == [] and gpu.done == []


def test_the_peak_is_the_larger_of_two_memories_or_the_sum_in_one(gpu: Gpu) -> None:
    small, large = Host(70 * MIB), Host(500 * MIB)
    assert peak_bytes(small, CUDA) == (338 if gpu.integrated else 268) * MIB  # type: ignore[arg-type]
    assert peak_bytes(large, CUDA) == (768 if gpu.integrated else 500) * MIB  # type: ignore[arg-type]


def test_what_a_unified_gpu_holds_is_what_this_process_holds(gpu: Gpu) -> None:
    host = Host(70 * MIB)
    assert held_bytes(host, CUDA) == (50 + 168 if gpu.integrated else 50) * MIB  # type: ignore[arg-type]
    assert held_bytes(host, CPU) == 50 * MIB  # type: ignore[arg-type]


def test_a_stage_begins_with_both_high_water_marks_reset(gpu: Gpu) -> None:
    reset(host := Host(0), CUDA)  # type: ignore[arg-type]
    assert host.resets == 1 and gpu.done == ["emptied", "reset"]
