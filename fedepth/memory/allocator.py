"""The memory allocator that this process runs with: its name, what it keeps for itself, and a cap on that.

What was freed is not always given back. tcmalloc (of gperftools) keeps spans of pages for the next request, which makes
training about twice as fast; glibc with low thresholds gives large blocks back at once. A measurement must not count
what is merely kept, and the next task must not find it missing.

What tcmalloc keeps would come to as much as half of what the tensors need. Its heap limit is the remedy: a request that
would pass the limit first gives free pages back, and fails only where that is not enough. So pages are kept while there
is room, and the footprint follows the tensors to within the cap.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

_MAPS = Path("/proc/self/maps")
_NAMES = re.compile(r"(tcmalloc_minimal|tcmalloc|jemalloc|mimalloc)[^/\s]*\.so[.\d]*")
# gperftools/malloc_extension.h: pages that are free but mapped, and free pages whose memory was given back.
_FREE = b"tcmalloc.pageheap_free_bytes"
_UNMAPPED = b"tcmalloc.pageheap_unmapped_bytes"
_COMMITTED = b"tcmalloc.pageheap_committed_bytes"
_LIMIT = b"tcmalloc.heap_limit_mb"
_METADATA = re.compile(rb"(\d+) \([^)]*\) Bytes in malloc metadata")
_STATISTICS_BYTES = 32 << 10
_MIB = 1 << 20
_WIDER_SHARE = 0.04


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


@lru_cache(maxsize=1)
def _library() -> Any:
    return ctypes.CDLL(None)


@lru_cache(maxsize=1)
def keeps_pages() -> bool:
    """Whether it is an allocator of which we know how to get pages back that it keeps."""
    return hasattr(_library(), "MallocExtension_ReleaseFreeMemory")


def release() -> None:
    """Gives free pages back to the system; address space may stay taken (see `retained_bytes`)."""
    library = _library()
    if keeps_pages():
        library.MallocExtension_ReleaseFreeMemory()
    elif hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def retained_bytes() -> int:
    """Address space that is free inside the allocator: it counts in VmData and serves the next requests."""
    return _property(_FREE) + _property(_UNMAPPED)


def heap_bytes() -> int:
    """Pages in use as the heap limit counts them, the allocator's own records included; 0 for other allocators."""
    return _property(_COMMITTED) - _property(_FREE) + _metadata_bytes() if keeps_pages() else 0


class HeapCap:
    """A bound on the heap within a `with` block; without effect for allocators that give everything back at once.

    Attributes:
        cap_bytes: what may be added above `held_bytes`.
    """

    def __init__(self, held_bytes: int, cap_bytes: int, most_bytes: int) -> None:
        """`held_bytes`: what the heap held when nothing was added yet. The cap never passes `most_bytes`."""
        self._held = held_bytes
        self._most = most_bytes
        self.cap_bytes = min(cap_bytes, most_bytes)

    def __enter__(self) -> HeapCap:
        self._set(self._held + self.cap_bytes)
        return self

    def __exit__(self, *_: object) -> None:
        self._set(0)

    def widen(self) -> bool:
        """Raises the cap by a few percent; False if that cannot help."""
        if not keeps_pages() or self.cap_bytes >= self._most:
            return False
        self.cap_bytes = min(self._most, self.cap_bytes + int(self.cap_bytes * _WIDER_SHARE) + _MIB)
        self._set(self._held + self.cap_bytes)
        return True

    def lower(self, most_bytes: int) -> None:
        """Keeps the cap at most there from now on, and gives free pages back."""
        self._most = min(self._most, most_bytes)
        if self.cap_bytes > self._most:
            self.cap_bytes = self._most
            self._set(self._held + self.cap_bytes)
        release()

    @staticmethod
    def _set(limit_bytes: int) -> None:
        if keeps_pages():
            _library().MallocExtension_SetNumericProperty(_LIMIT, ctypes.c_size_t(-(-limit_bytes // _MIB)))


def _property(key: bytes) -> int:
    value = ctypes.c_size_t()
    if keeps_pages():
        _library().MallocExtension_GetNumericProperty(key, ctypes.byref(value))
    return value.value


def _metadata_bytes() -> int:
    """tcmalloc's own records, which its heap limit counts; told in its statistics only, as text."""
    text = ctypes.create_string_buffer(_STATISTICS_BYTES)
    _library().MallocExtension_GetStats(text, _STATISTICS_BYTES)
    found = _METADATA.search(text.value)
    return int(found[1]) if found else 0
