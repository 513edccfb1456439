"""Keeps the idle agent small: settings of the C library's memory allocator, made once at the start."""

from __future__ import annotations

import ctypes
import platform

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_KEEP_BYTES = 64 << 10


def stay_small() -> None:
    """Makes glibc give back what was freed, and share one arena among gRPC's threads.

    By itself glibc raises its thresholds to the size of the largest buffer that was ever freed, 1 MiB after the first
    transfer, and then keeps such buffers. Other C libraries have no such setting and need none.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    for setting, value in (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_THRESHOLD, _KEEP_BYTES),
        (_M_TRIM_THRESHOLD, _KEEP_BYTES),
    ):
        library.mallopt(setting, value)
