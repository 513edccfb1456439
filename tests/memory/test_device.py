"""What counts and what holds on a GPU. A stand-in for torch.cuda: NEVER RUN ON HARDWARE.

Free and total bytes, reserved bytes and the per-process fraction mean what PyTorch's documentation of torch.cuda says
of mem_get_info, memory_reserved, max_memory_reserved and set_per_process_memory_fraction.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fedepth.memory import device as device_module
from fedepth.memory.device import bounded, held_bytes, peak_bytes, reset

MIB = 1 << 20
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Gpu:
    """8,000 MiB, of which 1,000 are free and this process has reserved 200 and at most 300."""

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
        self.fractions.append(fraction)

    def empty_cache(self) -> None:
        self.done.append("emptied")

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.done.append("reset")


class Host:
    """A meter of host memory."""

    def __init__(self, peak_bytes: int) -> None:
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
    # A discrete GPU: nine tenths of what is free, and what this process has reserved already. A unified one shares the
    # system's memory, and what its driver calls free is not all that is.
    expected = 5000 * MIB if gpu.integrated else 1100 * MIB
    assert bounded(5000 * MIB, CUDA) == expected
    assert bounded(400 * MIB, CUDA) == 400 * MIB
    assert gpu.fractions == [expected / (8000 * MIB), 400 / 8000]
    assert bounded(16_000 * MIB, CUDA) >= expected and gpu.fractions[-1] <= 1.0


def test_on_a_cpu_nothing_is_asked_of_a_gpu(gpu: Gpu) -> None:
    assert bounded(5000 * MIB, CPU) == 5000 * MIB
    assert peak_bytes(Host(70 * MIB), CPU) == 70 * MIB  # type: ignore[arg-type]
    reset(host := Host(0), CPU)  # type: ignore[arg-type]
    assert host.resets == 1 and gpu.fractions == [] and gpu.done == []


def test_the_peak_is_the_larger_of_two_memories_or_the_sum_in_one(gpu: Gpu) -> None:
    small, large = Host(70 * MIB), Host(500 * MIB)
    assert peak_bytes(small, CUDA) == (370 if gpu.integrated else 300) * MIB  # type: ignore[arg-type]
    assert peak_bytes(large, CUDA) == (800 if gpu.integrated else 500) * MIB  # type: ignore[arg-type]


def test_what_a_unified_gpu_holds_is_what_this_process_holds(gpu: Gpu) -> None:
    host = Host(70 * MIB)
    assert held_bytes(host, CUDA) == (50 + 200 if gpu.integrated else 50) * MIB  # type: ignore[arg-type]
    assert held_bytes(host, CPU) == 50 * MIB  # type: ignore[arg-type]


def test_a_stage_begins_with_both_high_water_marks_reset(gpu: Gpu) -> None:
    reset(host := Host(0), CUDA)  # type: ignore[arg-type]
    assert host.resets == 1 and gpu.done == ["emptied", "reset"]
