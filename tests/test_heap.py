"""Settings of the C library's allocator, as the allocator itself tells of them."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Prints how many arenas there are after threads have met at the allocator (malloc_info(3)).
HOLES = """
import ctypes, sys
from fedepth.heap import return_free_pages
library = ctypes.CDLL(None)
library.malloc.restype = library.memset.restype = ctypes.c_void_p
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
pieces = [library.memset(library.malloc(60_000), 1, 60_000) for _ in range(1000)]
for piece in pieces[::2]:
    library.free(piece)
before = resident()
return_free_pages()
print(before - resident())
"""
ARENAS = """
import ctypes, os, threading
from fedepth.heap import share_one_arena
{call}
met = threading.Barrier(4)
def allocate():
    met.wait()
    for _ in range(200):
        bytearray(30_000)
    met.wait()
threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
library = ctypes.CDLL(None)
library.fdopen.restype = ctypes.c_void_p
stream = library.fdopen(os.dup(1), b"w")
library.malloc_info(0, ctypes.c_void_p(stream))
library.fclose(ctypes.c_void_p(stream))
"""


def arenas(call: str) -> int:
    told = subprocess.run([sys.executable, "-c", ARENAS.format(call=call)], capture_output=True, text=True, check=True)
    return told.stdout.count("<heap nr=")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_threads_share_one_arena() -> None:
    assert arenas("share_one_arena()") == 1
    assert arenas("") > 1  # what it is for


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such function")
def test_free_pages_between_those_in_use_are_returned() -> None:
    told = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(told.stdout) > 20_000_000  # of the 30 MB that were freed
