"""The cap on what tcmalloc keeps, in a process that really runs with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from fedepth.memory.environment import environment, find_tcmalloc

MIB = 1 << 20
# Pieces of 4 MiB are written to, freed, and asked for again in another size, which fits none of the free ones.
PROGRAM = """
import ctypes, json, mmap, sys
from fedepth.memory import allocator
from fedepth.memory.meter import Meter

MIB = 1 << 20
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p

def take(mebibytes):
    address = library.malloc(ctypes.c_size_t(mebibytes * MIB))
    if address:
        ctypes.memset(address, 1, mebibytes * MIB)
    return address

def give(*addresses):
    for address in addresses:
        library.free(ctypes.c_void_p(address))

def holes_then_large():
    meter.reset()
    small = [take(4) for _ in range(10)]
    give(*small[::2])
    large = take(12)
    served = large is not None
    give(*small[1::2], *([large] if served else []))
    return {"served": served, "peak": meter.peak_bytes}

meter = Meter()
holes_then_large()  # the kernel may map 2 MiB of a library where one page of it is touched first
meter = Meter()
held = meter.baseline.heap_bytes
told = {"held": held, "committed": allocator._property(allocator._COMMITTED)}
told["free"] = holes_then_large()
with allocator.HeapCap(held, 44 * MIB):
    told["capped"] = holes_then_large()
with allocator.HeapCap(held, 30 * MIB):
    taken = [take(4) for _ in range(10)]
    told["too_low"] = [address is not None for address in taken]
    give(*(address for address in taken if address))
with allocator.HeapCap(held, 30 * MIB) as cap:
    told["resized"] = []
    for size in (14, 300, 30):  # never above the first
        cap.resize(size * MIB)
        taken = [take(4) for _ in range(10)]
        told["resized"].append(sum(address is not None for address in taken))
        give(*(address for address in taken if address))
KIB = 1024
told["to_the_page"] = []
for size in range(10 * MIB - 96 * KIB, 11 * MIB, 256 * KIB):
    meter.reset()
    before = meter.held_bytes
    give(take(4))  # free pages that are still there
    with allocator.HeapCap(held, size):
        told["to_the_page"].append([meter.held_bytes - before])
        for more in (-64 * KIB, 64 * KIB):
            address = library.malloc(ctypes.c_size_t(size + more))
            told["to_the_page"][-1].append(address is not None)
            library.free(ctypes.c_void_p(address))
with allocator.release_freed():
    with allocator.release_freed():
        pass  # the end of this one does not end the other
    told["nothing_kept"] = holes_then_large()
before = meter.outside_heap_bytes
mapped = mmap.mmap(-1, 8 * MIB)  # what the heap knows nothing of
mapped.write(bytes(8 * MIB))
on_heap = take(16)
told["outside"] = meter.outside_heap_bytes - before
there = allocator.look_at_tensors(lambda: mmap.mmap(-1, 8 * MIB), 8 * MIB)
told["elsewhere"] = [there, allocator.can_be_capped(), allocator.heap_bytes(), allocator.data_overhead_bytes(64 * MIB)]
with allocator.HeapCap(held, 14 * MIB):
    taken = [take(4) for _ in range(10)]
    told["uncapped"] = sum(address is not None for address in taken)
    give(*(address for address in taken if address))
there = allocator.look_at_tensors(lambda: ctypes.create_string_buffer(8 * MIB), 8 * MIB)
told["here"] = [there, allocator.can_be_capped()]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    if find_tcmalloc() is None:
        pytest.skip("tcmalloc is not installed here (apt install libtcmalloc-minimal4)")
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **environment("tcmalloc")},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def test_without_a_cap_holes_come_on_top(told: dict[str, Any]) -> None:
    assert told["free"]["served"]
    assert told["free"]["peak"] >= 50 * MIB  # 40, and 12 that fit into no hole


def test_under_a_cap_free_pages_are_given_back_before_a_request_fails(told: dict[str, Any]) -> None:
    assert told["capped"]["served"]
    assert told["capped"]["peak"] <= 46 * MIB


def test_what_does_not_fit_under_the_cap_is_refused(told: dict[str, Any]) -> None:
    assert told["too_low"].count(True) == 7  # of 4 MiB each, in 30


def test_a_cap_can_fall_and_rise_again_up_to_what_it_was(told: dict[str, Any]) -> None:
    assert told["resized"] == [3, 7, 7]


def test_a_cap_that_is_no_whole_mebibyte_holds_to_a_few_pages_and_takes_no_memory(told: dict[str, Any]) -> None:
    for taken, below, above in told["to_the_page"]:
        assert taken <= 64 << 10
        assert below and not above


def test_where_tensors_come_from_elsewhere_no_cap_is_relied_on(told: dict[str, Any]) -> None:
    # The same overhead as without tcmalloc, which RLIMIT_DATA then allows.
    assert told["elsewhere"] == [False, False, 0, 16 * MIB]
    assert told["uncapped"] == 10
    assert told["here"] == [True, True]


def test_with_nothing_kept_the_high_water_mark_is_that_of_what_is_in_use(told: dict[str, Any]) -> None:
    assert told["nothing_kept"]["served"]
    assert 39 * MIB <= told["nothing_kept"]["peak"] <= 42 * MIB


def test_what_lies_beside_the_heap_is_told_apart(told: dict[str, Any]) -> None:
    assert abs(told["outside"] - 8 * MIB) <= MIB // 4


def test_what_the_limit_counts_is_found_though_no_statistic_tells_it(told: dict[str, Any]) -> None:
    assert told["committed"] <= told["held"] <= told["committed"] + 64 * MIB
