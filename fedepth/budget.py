"""What training may add on a device, and the bounds that it follows from. No torch, no numpy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryLimit:
    """One bound on what a process may take.

    Attributes:
        origin: where the bound comes from, such as "MemAvailable" or "/sys/fs/cgroup/user.slice".
        available_bytes: what is left under it now.
        limit_bytes: the bound itself; 0 where there is none besides what is left.
    """

    origin: str
    available_bytes: int
    limit_bytes: int = 0


@dataclass(frozen=True)
class Budget:
    """What training may add on a device, and how that follows from what was measured.

    budget = min(cap, available × fraction − reserve − start), never below 0.

    Attributes:
        total_bytes: physical memory of the device.
        available_bytes: the smallest of `limits`.
        limits: every bound that was found.
        start_bytes: what starting the trainer costs before it holds weights or data.
        reserve_bytes: left to others by the operator's wish.
        fraction: part of the available memory that may be used at all.
        cap_bytes: the operator's cap on the budget; 0 for none.
        budget_bytes: the result.
    """

    total_bytes: int
    available_bytes: int
    limits: tuple[MemoryLimit, ...]
    start_bytes: int
    reserve_bytes: int
    fraction: float
    cap_bytes: int
    budget_bytes: int
