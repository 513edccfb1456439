"""The memory of the device that a stage trains on: its peak, and the limit that holds it.

    CPU                what the process added (fedepth.memory.meter), held by RLIMIT_DATA
    discrete CUDA      what the caching allocator reserved beyond what it had at the baseline, held by its own limit
                       for a process; RLIMIT_DATA does not bound it. The context was made before the baseline and is
                       not among the free bytes
    unified (Jetson)   both, out of the same bytes. Free is then what the system says, not cudaMemGetInfo, which counts
                       MemFree only (ollama issue 12283, vLLM pull request 35356)

The unified path was never run on hardware.
"""

from __future__ import annotations

import torch

from fedepth.memory import allocator
from fedepth.memory.meter import Meter

_CUDA_FRACTION = 0.9  # of what is free; the driver and fragmentation take some
# CUDA's driver and libraries load kernels at their first use, into memory of the host that no warm-up tells: other
# sizes take other kernels. Limits leave so much room for them, so that none fails; the peak counts them.
_KERNELS_BYTES = 1 << 30


def new_meter(device: torch.device) -> Meter:
    """A meter whose baseline is now. A GPU's holds workspaces by then, such as those of cuBLAS, which stay."""
    if device.type != "cuda":
        return Meter()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return Meter(torch.cuda.memory_reserved(device))


def reset(meter: Meter, device: torch.device) -> None:
    """Begins a stage: high-water marks are set to what is held now."""
    meter.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(meter: Meter, device: torch.device) -> int:
    """The stage's peak above the baseline: host memory, or the GPU's where that is larger."""
    if device.type != "cuda":
        return meter.peak_bytes
    # What is reserved, not what is allocated: blocks that the caching allocator keeps are gone for everybody else.
    reserved = max(0, torch.cuda.max_memory_reserved(device) - meter.baseline.reserved_bytes)
    return meter.peak_bytes + reserved if _is_unified(device) else max(meter.peak_bytes, reserved)


def held_bytes(meter: Meter, device: torch.device) -> int:
    """What this process holds now above the baseline, of the memory that its budget is measured in: a discrete GPU's
    own memory comes on top of that (`bounded`)."""
    if device.type != "cuda" or not _is_unified(device):
        return meter.held_bytes
    return meter.held_bytes + _reserved_bytes(meter, device)


def bounded(budget_bytes: int, meter: Meter, device: torch.device, *, enforce: bool) -> int:
    """The budget as far as the device's own memory allows it.

    Args:
        enforce: CUDA's allocator is held to it from now on; else to nothing.
    """
    if device.type != "cuda":
        return budget_bytes
    free, total = torch.cuda.mem_get_info(device)
    # On a unified board `free` leaves out the page cache, which the system would give up; the budget counts with it.
    if not _is_unified(device):
        budget_bytes = min(budget_bytes, int(free * _CUDA_FRACTION) + _reserved_bytes(meter, device))
    limit = budget_bytes + meter.baseline.reserved_bytes if enforce else total
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    return budget_bytes


def host_overhead_bytes(budget_bytes: int, device: torch.device) -> int:
    """By how much the address space of this process may run ahead of what a budget lets it hold."""
    return allocator.data_overhead_bytes(budget_bytes) + kernels_bytes(device)


def kernels_bytes(device: torch.device) -> int:
    """What a GPU's driver may load into the host's memory, beside what is trained."""
    return _KERNELS_BYTES if device.type == "cuda" else 0


def _reserved_bytes(meter: Meter, device: torch.device) -> int:
    """Above the baseline."""
    return max(0, torch.cuda.memory_reserved(device) - meter.baseline.reserved_bytes)


def _is_unified(device: torch.device) -> bool:
    return bool(torch.cuda.get_device_properties(device).is_integrated)
