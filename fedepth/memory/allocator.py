"""The memory allocator that this process runs with: its name, what it keeps for itself, and a cap on that.

What was freed is not always given back. tcmalloc (of gperftools) keeps spans of pages for the next request, which makes
training about twice as fast; glibc with low thresholds gives large blocks back at once. A measurement must not count
what is merely kept, and the next task must not find it missing.

What tcmalloc keeps would come to as much as half of what the tensors need. Its heap limit is the remedy: a request that
would pass the limit first gives free pages back, and fails only where that is not enough. So pages are kept while there
is room, and the footprint follows the tensors to within the cap.

Some builds of torch, such as the wheels for 64-bit ARM, bring an allocator of their own for tensors. A cap on the heap
would then hold nothing that matters, so `look_at_tensors` finds out, and only RLIMIT_DATA is relied on.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

_MAPS = Path("/proc/self/maps")
_NAMES = re.compile(r"(tcmalloc_minimal|tcmalloc|jemalloc|mimalloc)[^/\s]*\.so[.\d]*")
# gperftools/malloc_extension.h: pages that are mapped and were not given back, and two settings.
_ALLOCATED = b"generic.current_allocated_bytes"
_COMMITTED = b"tcmalloc.pageheap_committed_bytes"
_LIMIT = b"tcmalloc.heap_limit_mb"
_DECOMMIT = b"tcmalloc.aggressive_memory_decommit"
_MOST_RECORDS_MIB = 64
_MIB = 1 << 20
_PAGE = 8 << 10  # what tcmalloc counts in
_RESERVED_MOST = 1 << 36  # beyond that a cap is none
_UNRESERVED_BYTES = 24 << 20  # of address space, for what does not come from the heap, such as compiled kernels
_STATUS = Path("/proc/self/status")
_DATA = re.compile(r"^VmData:\s+(\d+) kB", re.MULTILINE)


@lru_cache(maxsize=1)  # a process keeps its allocator, and its maps are long
def name() -> str:
    """Such as "libtcmalloc_minimal.so.4.5.10", or "glibc 2.36, thresholds 65536"."""
    maps = _MAPS.read_text()
    found = _NAMES.search(maps)
    if found:
        return "lib" + found.group(0)
    library = re.search(r"(libc\.so\.6|ld-musl[^\s]*)", maps)
    thresholds = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    text = " ".join(platform.libc_ver()) if library else "unknown"
    return f"{text}, thresholds {thresholds}" if thresholds else text


_tensors_elsewhere = False


def look_at_tensors(make: Callable[[], object], size_bytes: int) -> bool:
    """Whether what `make` returns, of `size_bytes`, comes out of this allocator's heap.

    If not, this process's allocator counts as one without a cap from now on: RLIMIT_DATA alone has to hold.
    """
    global _tensors_elsewhere
    _tensors_elsewhere = False
    if _keeps_pages():
        before = _property(_ALLOCATED)
        made = make()
        _tensors_elsewhere = _property(_ALLOCATED) - before < size_bytes // 2
        del made
    return not _tensors_elsewhere


@lru_cache(maxsize=1)
def _library() -> Any:
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    return library


def _keeps_pages() -> bool:
    """Whether it is an allocator of which we know how to get pages back that it keeps."""
    return hasattr(_library(), "MallocExtension_ReleaseFreeMemory")


def can_be_capped() -> bool:
    """Whether a cap on this allocator's heap holds what training takes."""
    return _keeps_pages() and not _tensors_elsewhere


def release() -> None:
    """Gives free pages back to the system; address space may stay taken."""
    library = _library()
    if _keeps_pages():
        library.MallocExtension_ReleaseFreeMemory()
    elif hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def data_overhead_bytes(budget_bytes: int) -> int:
    """By how much address space, which RLIMIT_DATA counts, may run ahead of what is resident.

    Thread arenas and partly used mappings come to 10 MiB. What tcmalloc gives back stays in its address space, and may
    lie in pieces; its cap is the tighter limit.
    """
    return (32 << 20) + budget_bytes // 2 if can_be_capped() else 16 << 20


def heap_bytes() -> int:
    """Pages in use as the heap limit counts them; 0 for allocators without a limit.

    The limit counts records of the allocator's own that no statistic tells, so the figure is searched for: the lowest
    limit under which 1 MiB can be had, less the most that can be had under it.
    """
    if not can_be_capped():
        return 0
    release()
    # Searched by whole MiB first, since the limit is set in those, and then by pages under the limit that was found.
    committed = _property(_COMMITTED) // _MIB
    limit = _first(range(committed, committed + _MOST_RECORDS_MIB), lambda mebibytes: _can_have(_MIB, mebibytes))
    pages = range(1, _MIB // _PAGE)
    too_many = _first(pages, lambda count: not _can_have(_MIB + count * _PAGE, limit))
    _set_property(_LIMIT, 0)
    return (limit - 1) * _MIB - (too_many - 1) * _PAGE


def _first(numbers: range, holds: Callable[[int], bool]) -> int:
    """The first for which it holds, as for all above it; the end if there is none."""
    return numbers.start + bisect_left(numbers, True, key=holds)


def _can_have(size_bytes: int, limit_mib: int) -> bool:
    _set_property(_LIMIT, limit_mib)
    library = _library()
    address = library.malloc(ctypes.c_size_t(size_bytes))
    library.free(ctypes.c_void_p(address))
    release()  # the limit does not look at pages that are still there
    return address is not None


class HeapCap:
    """A bound on the heap within a `with` block; without effect for allocators that give everything back at once."""

    def __init__(self, held_bytes: int, cap_bytes: int) -> None:
        """`held_bytes`: what the heap held when nothing was added yet; `cap_bytes`: what may be added at most."""
        self._held = held_bytes
        self.cap_bytes = self._now = cap_bytes
        self._plug: int | None = None

    def __enter__(self) -> HeapCap:
        self._limit(self.cap_bytes)
        if not _property(_DECOMMIT):
            _reserve(min(self.cap_bytes, _address_space_left() - _UNRESERVED_BYTES))
        return self

    def __exit__(self, *_: object) -> None:
        self._lift()

    def resize(self, cap_bytes: int) -> None:
        """Another bound from now on, never above the first; free pages are given back."""
        before, self._now = self._now, min(cap_bytes, self.cap_bytes)
        if self._now != before:
            self._limit(self._now)

    def _limit(self, cap_bytes: int) -> None:
        """The allocator takes limits in whole MiB. What the next one is too much is taken up by a block that nobody
        writes to, so that it takes no memory."""
        self._lift()
        if not can_be_capped():
            return
        release()  # else the block would lie on pages that take memory
        limit_bytes = self._held + cap_bytes
        limit_mib = limit_bytes // _MIB + 2
        self._plug = _library().malloc(ctypes.c_size_t(limit_mib * _MIB - limit_bytes))
        _set_property(_LIMIT, limit_mib if self._plug else limit_mib - 2)

    def _lift(self) -> None:
        _set_property(_LIMIT, 0)
        _library().free(ctypes.c_void_p(self._plug))
        self._plug = None


def _reserve(size_bytes: int) -> None:
    """Makes one free span, as large as the cap allows, out of which what follows is served.

    It takes no memory until it is written to. Without it, requests are served from the pieces that were given back
    before, which lie scattered: what is free then seldom fits, and up to half comes on top of what is needed.
    """
    library = _library()
    while can_be_capped() and _MIB <= size_bytes < _RESERVED_MOST:
        address = library.malloc(ctypes.c_size_t(size_bytes))
        if address is not None:
            library.free(ctypes.c_void_p(address))
            return
        # Refused: the largest span that can be had will do.
        size_bytes -= max(_MIB, size_bytes // 32)


@contextmanager
def release_freed() -> Iterator[None]:
    """Within the block, what is freed is given back at once: slow, and the high-water mark is that of the tensors."""
    before = _property(_DECOMMIT)
    _set_property(_DECOMMIT, 1)
    try:
        yield
    finally:
        _set_property(_DECOMMIT, before)


def _set_property(key: bytes, value: int) -> None:
    if _keeps_pages():
        _library().MallocExtension_SetNumericProperty(key, ctypes.c_size_t(value))


def _address_space_left() -> int:
    """What RLIMIT_DATA leaves; what the system calls infinity where there is none."""
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY:
        return _RESERVED_MOST * 2
    taken = _DATA.search(_STATUS.read_text())
    return soft - int(taken[1]) * 1024 if taken else 0


def _property(key: bytes) -> int:
    value = ctypes.c_size_t()
    if _keeps_pages():
        _library().MallocExtension_GetNumericProperty(key, ctypes.byref(value))
    return value.value
