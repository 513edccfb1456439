"""The memory of the device that a stage trains on: its peak, and the limit that holds it.

    CPU                what the process added (fedepth.memory.meter), held by RLIMIT_DATA
    discrete CUDA      what the caching allocator reserved, held by the allocator's own per-process limit; RLIMIT_DATA
                       does not bound it. The context was made before the baseline and is not among the free bytes
    unified (Jetson)   both, out of the same bytes. Free is then what the system says, not cudaMemGetInfo, which counts
                       MemFree only (ollama issue 12283, vLLM pull request 35356)

The CUDA paths were never run on hardware of either kind.
"""

from __future__ import annotations

import torch

from fedepth.memory.meter import Meter

_CUDA_FRACTION = 0.9  # of what is free; the driver and fragmentation take some


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
    reserved = torch.cuda.max_memory_reserved(device)
    return meter.peak_bytes + reserved if _is_unified(device) else max(meter.peak_bytes, reserved)


def held_bytes(meter: Meter, device: torch.device) -> int:
    """What this process holds now above the baseline, of the memory that its budget is measured in: a discrete GPU's
    own memory comes on top of that (`bounded`)."""
    if device.type != "cuda" or not _is_unified(device):
        return meter.held_bytes
    return meter.held_bytes + torch.cuda.memory_reserved(device)


def bounded(budget_bytes: int, device: torch.device) -> int:
    """The budget as far as the device's own memory allows it; CUDA's allocator is held to it from now on."""
    if device.type != "cuda":
        return budget_bytes
    free, total = torch.cuda.mem_get_info(device)
    # On a unified board `free` leaves out the page cache, which the system would give up; the budget counts with it.
    if not _is_unified(device):
        budget_bytes = min(budget_bytes, int(free * _CUDA_FRACTION) + torch.cuda.memory_reserved(device))
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total), device)
    return budget_bytes


def _is_unified(device: torch.device) -> bool:
    return bool(torch.cuda.get_device_properties(device).is_integrated)
