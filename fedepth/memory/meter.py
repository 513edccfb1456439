"""What a process really used, from /proc/self, above one baseline per task.

VmHWM after a reset is the exact total, file pages included. Its anonymous part can only be sampled, so that figure is a
lower bound. `ru_maxrss` is of no use: a child inherits it from its parent.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

from fedepth.memory import allocator

_STATUS = Path("/proc/self/status")


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as "VmRSS" or "VmData", in bytes."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(f"{_STATUS} has no field {field}")


@dataclass(frozen=True)
class Baseline:
    """What the process held before weights and data.

    Attributes:
        resident_bytes: VmRSS.
        anonymous_bytes: RssAnon.
        data_bytes: VmData, what RLIMIT_DATA counts.
        heap_bytes: what the allocator's own limit counts; 0 where it has none.
        reserved_bytes: what a GPU's caching allocator had reserved; 0 on a CPU.
    """

    resident_bytes: int
    anonymous_bytes: int
    data_bytes: int
    heap_bytes: int
    reserved_bytes: int = 0


class Meter:
    """Peaks above one baseline. Reset it at the start of every stage; sample it between batches."""

    def __init__(self, reserved_bytes: int = 0) -> None:
        """See `fedepth.memory.device.new_meter`, which knows what a GPU has reserved."""
        # Free pages in the baseline would be room that a stage fills unseen: its peak would come out too low.
        allocator.release()
        heap = allocator.heap_bytes()
        resident, anonymous, data = (status_bytes(field) for field in ("VmRSS", "RssAnon", "VmData"))
        self.baseline = Baseline(resident, anonymous, data, heap, reserved_bytes)
        self._anonymous = 0

    def reset(self) -> None:
        """Gives free pages back and sets the kernel's high-water mark to what is resident then."""
        allocator.release()
        # 5 sets VmHWM to VmRSS (proc(5)). Without it, every stage would show the largest peak of those before it.
        Path("/proc/self/clear_refs").write_text("5")
        self._anonymous = 0
        self.sample()

    def sample(self) -> None:
        self._anonymous = max(self._anonymous, status_bytes("RssAnon") - self.baseline.anonymous_bytes)

    @property
    def peak_bytes(self) -> int:
        """VmHWM above the baseline since the last reset; exact."""
        return max(0, status_bytes("VmHWM") - self.baseline.resident_bytes)

    @property
    def anonymous_peak_bytes(self) -> int:
        """The anonymous part of it as far as it was sampled; a lower bound."""
        return max(0, self._anonymous)

    @property
    def outside_heap_bytes(self) -> int:
        """What has come outside the heap since the baseline: compiled kernels, stacks, pages of libraries.

        Gives free pages back. 0 for allocators that do not tell.
        """
        # No statistic tells it apart: it is what is resident beyond the baseline and not on the heap.
        heap = allocator.heap_bytes()
        return max(0, self.held_bytes - (heap - self.baseline.heap_bytes)) if heap else 0

    @property
    def held_bytes(self) -> int:
        """What the process holds now above the baseline."""
        return max(0, status_bytes("VmRSS") - self.baseline.resident_bytes)


class DataLimit:
    """RLIMIT_DATA as a soft limit around a task; the hard limit stays, so that the next task may have another.

    Address space runs ahead of what is resident; `overhead_bytes` is by how much it may. The kernel looks at the limit
    when address space is asked for, so what an allocator has retained is out of its reach: `allocator.HeapCap` is for
    that.
    """

    def __init__(self, data_bytes: int, budget_bytes: int, overhead_bytes: int) -> None:
        # Only the soft limit moves: a hard one that was lowered cannot be raised again, and the trainer lives on.
        self._before, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = data_bytes + budget_bytes + overhead_bytes
        self.limit_bytes = limit if hard == resource.RLIM_INFINITY else min(limit, hard)

    def __enter__(self) -> DataLimit:
        self._set(self.limit_bytes)
        return self

    def __exit__(self, *_: object) -> None:
        self._set(self._before)

    @staticmethod
    def _set(soft: int) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, resource.getrlimit(resource.RLIMIT_DATA)[1]))
