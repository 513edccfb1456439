"""Pages are given back only by allocators that keep them, only near the peak, and only within the block."""

import pytest
import torch
from torch import nn

from fedepth.memory import allocator
from fedepth.models.split import Unit
from fedepth.training.relief import Relief

MIB = 1 << 20


class Heap:
    """Stands for tcmalloc's answers."""

    def __init__(self) -> None:
        self.free, self.resident, self.released = 8 * MIB, 0, 0

    def release(self) -> None:
        self.released += 1
        self.free = 0


@pytest.fixture
def heap(monkeypatch: pytest.MonkeyPatch) -> Heap:
    heap = Heap()
    monkeypatch.setattr(allocator, "keeps_pages", lambda: True)
    monkeypatch.setattr(allocator, "free_bytes", lambda: heap.free)
    monkeypatch.setattr(allocator, "resident_bytes", lambda: heap.resident)
    monkeypatch.setattr(allocator, "release", heap.release)
    return heap


def unit() -> Unit:
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    return Unit("0", (module,), (module,), ("0.0.weight", "0.0.bias"), (), nn.Sequential(module))


def test_pages_are_kept_while_what_is_in_use_is_far_from_the_peak(heap: Heap) -> None:
    block = unit()
    with Relief([block], 100 * MIB, 40 * MIB) as relieve:
        heap.resident = 100 * MIB + 41 * MIB  # 33 of them in use, 8 kept from the step before
        block(torch.zeros(1, 2))
        relieve()
    assert heap.released == 0


@pytest.mark.parametrize(("resident", "free"), [(100 + 39, 2), (100 + 42, 30)], ids=["use nears the peak", "beyond it"])
def test_near_the_peak_they_are_given_back_before_the_next_operation(heap: Heap, resident: int, free: int) -> None:
    block = unit()
    heap.free = free * MIB
    with Relief([block], 100 * MIB, 40 * MIB) as relieve:
        heap.resident = resident * MIB
        block(torch.zeros(1, 2))
        assert heap.released == 1  # then nothing was left to give back
        heap.free = 2 * MIB
        relieve()
        assert heap.released == 2
    heap.free = free * MIB
    block(torch.zeros(1, 2))
    relieve()
    assert heap.released == 2


def test_other_allocators_are_left_alone(heap: Heap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "keeps_pages", lambda: False)
    block = unit()
    with Relief([block], 0, 0) as relieve:
        heap.resident = 121 * MIB
        block(torch.zeros(1, 2))
        relieve()
    assert heap.released == 0
