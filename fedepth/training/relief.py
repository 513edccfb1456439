"""Gives free pages back just before they would push resident memory to its peak.

An allocator that keeps freed pages is fast, but what it keeps at the moment of the peak counts as well: with tcmalloc
up to 40 % on top of the tensors. Giving everything back at once is exact, and as slow as mapping every tensor anew.
Between the two: keep pages while there is room, and give them back, between two operations, once the process nears its
predicted peak. That is most of the speed, and most of the exactness: small tensors in one long operation still slip by
(docs/memory.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.hooks import RemovableHandle

from fedepth.memory import allocator
from fedepth.models.split import Unit

# Of the predicted peak: pages in use from which on none are kept, and resident pages that are never passed knowingly.
_IN_USE = 0.9
_RESIDENT = 1.04
_WORTH_BYTES = 1 << 20


class Relief:
    """Within its `with` block, looks before every module of some units runs, and whenever it is called."""

    def __init__(self, units: Sequence[Unit], baseline_bytes: int, predicted_bytes: int) -> None:
        """`baseline_bytes`: what was resident before the task; the predicted peak comes on top of it."""
        self._in_use = baseline_bytes + int(predicted_bytes * _IN_USE)
        self._resident = baseline_bytes + int(predicted_bytes * _RESIDENT)
        self._modules = {module for unit in units for top in unit.modules for module in top.modules()}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Relief:
        if allocator.keeps_pages():
            self._handles = [module.register_forward_pre_hook(self) for module in self._modules]
        return self

    def __call__(self, *_: Any) -> None:
        if self._handles:
            free = allocator.free_bytes()
            # What is in use decides, not what is resident: far from the peak, free pages will serve the next requests.
            if free > _WORTH_BYTES:
                resident = allocator.resident_bytes()
                if resident - free > self._in_use or resident > self._resident:
                    allocator.release()

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
