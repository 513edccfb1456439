"""The allocator of a trainer: found where distributions put it, and never one that is not there."""

from pathlib import Path

import pytest

from fedepth.errors import ConfigError
from fedepth.memory.environment import environment, find_tcmalloc

DEBIAN = "usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4"


def install(root: Path, path: str) -> Path:
    library = root / path
    library.parent.mkdir(parents=True)
    library.touch()
    return library


@pytest.mark.parametrize("path", [DEBIAN, "usr/lib64/libtcmalloc_minimal.so.4", "usr/lib/libtcmalloc_minimal.so.4"])
def test_tcmalloc_is_found_where_distributions_put_it(tmp_path: Path, path: str) -> None:
    library = install(tmp_path, path)
    assert find_tcmalloc(tmp_path) == library
    assert environment("tcmalloc", root=tmp_path)["LD_PRELOAD"] == str(library)


def test_glibc_is_told_to_give_back_what_is_freed(tmp_path: Path) -> None:
    assert environment("glibc", root=tmp_path) == {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MIMALLOC_DISALLOW_ARENA_ALLOC": "1",
        "MKL_DISABLE_FAST_MM": "1",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "1000",
    }
    assert environment("glibc", threads=3, root=tmp_path)["OMP_NUM_THREADS"] == "3"


def test_tcmalloc_by_name_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not installed: apt install libtcmalloc-minimal4"):
        environment("tcmalloc", root=tmp_path)
