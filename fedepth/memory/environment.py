"""Which memory allocator a trainer is started with.

An allocator is fit for training inside a budget if its footprint follows the tensors. glibc's does once its thresholds
are fixed, though every large tensor is then mapped and unmapped anew; with its defaults it does not. tcmalloc trains up
to three times as fast, and its footprint follows the tensors under a cap (fedepth.memory.allocator). Which of them
suits a device is measured there (edge_client.measure.calibration).
"""

from __future__ import annotations

from pathlib import Path

from fedepth.errors import ConfigError

# Debian, Ubuntu, JetPack, Raspberry Pi OS (libtcmalloc-minimal4); Fedora and openSUSE (gperftools-libs); Alpine, Arch.
_FOLDERS = ("usr/lib/*-linux-gnu*", "usr/lib64", "usr/lib", "usr/local/lib")
_LIBRARY = "libtcmalloc_minimal.so.4"


def find_tcmalloc(root: Path = Path("/")) -> Path | None:
    """Where tcmalloc lies on this device."""
    for folder in _FOLDERS:
        found = sorted(root.glob(f"{folder}/{_LIBRARY}"))
        if found:
            return found[0]
    return None


def available(root: Path = Path("/")) -> dict[str, Path | None]:
    """The allocators that a trainer can be started with here, by name, with the library to load first if any."""
    tcmalloc = find_tcmalloc(root)
    return {"glibc": None} if tcmalloc is None else {"glibc": None, "tcmalloc": tcmalloc}


def environment(allocator: str, threads: int = 0, root: Path = Path("/")) -> dict[str, str]:
    """What a trainer's environment needs so that its memory follows its tensors.

    Args:
        allocator: "glibc", "tcmalloc", or "auto" for tcmalloc where it is installed.
        threads: for OpenMP; 0 leaves the choice to torch.

    Raises:
        ConfigError: tcmalloc was asked for by name and is not installed.
    """
    settings = {
        # Arenas of 1 GiB of address space would defeat RLIMIT_DATA (torch's aarch64 wheels bring mimalloc).
        "MIMALLOC_DISALLOW_ARENA_ALLOC": "1",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        # MKL would keep several MiB of packed matrices for every thread.
        "MKL_DISABLE_FAST_MM": "1",
        # Threads that spin while they wait take the cores from whatever else runs on the device, and from each other;
        # to wake threads that sleep takes longer than many an operation. GNU's OpenMP spins for some microseconds.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "1000",
        # glibc raises both as it runs, and then keeps what was freed; other allocators ignore them.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    if threads:
        settings["OMP_NUM_THREADS"] = str(threads)
    tcmalloc = None if allocator == "glibc" else find_tcmalloc(root)
    if tcmalloc is None:
        if allocator == "tcmalloc":
            raise ConfigError(
                f'trainer.allocator is "tcmalloc", but {_LIBRARY} is not installed: '
                'apt install libtcmalloc-minimal4, or set it to "auto"'
            )
    else:
        settings["LD_PRELOAD"] = str(tcmalloc)
        settings["TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD"] = str(1 << 62)  # refused requests are reported as errors
        settings["TCMALLOC_RELEASE_RATE"] = "0"  # pages are given back when the trainer says so
        settings["TCMALLOC_MAX_TOTAL_THREAD_CACHE_BYTES"] = str(1 << 20)  # 32 MiB by itself, out of anyone's reach
    return settings
