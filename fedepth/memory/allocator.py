"""The memory allocator that this process runs with: its name, and what it keeps for itself.

What was freed is not always given back. tcmalloc (of gperftools) keeps spans of pages for the next request, which makes
training about twice as fast; glibc with low thresholds gives large blocks back at once. A measurement must not count
what is merely kept, and the next task must not find it missing.
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
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")


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


def free_bytes() -> int:
    """Pages that are free and still resident, as far as the allocator tells. Takes about a microsecond."""
    return _property(_FREE)


def retained_bytes() -> int:
    """Address space that is free inside the allocator: it counts in VmData and serves the next requests."""
    return _property(_FREE) + _property(_UNMAPPED)


def resident_bytes() -> int:
    """VmRSS, read in the quickest way."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE_BYTES


def _property(key: bytes) -> int:
    value = ctypes.c_size_t()
    if keeps_pages():
        _library().MallocExtension_GetNumericProperty(key, ctypes.byref(value))
    return value.value
