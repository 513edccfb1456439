"""What holds a stage inside its budget: the cap on its heap, the look at its first step, errors of going over it.

RLIMIT_DATA holds what a process asks for, the heap's cap what an allocator may hand out; neither counts pages that are
read from files. The first step is held against the budget for what both let through.

A process whose limit was met is of no use any more, and whoever started it starts another. oneDNN compiles kernels with
Xbyak, which notes an error of its own in the thread that met it, and nothing takes that back: where memory for one
kernel was refused, every later compilation in this thread fails, whatever is free by then ("could not create a
primitive", torch 2.14).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fedepth.errors import OverBudgetError
from fedepth.estimate.peak import may_keep_bytes, needed_bytes
from fedepth.memory import allocator
from fedepth.memory.device import kernels_bytes, peak_bytes
from fedepth.memory.meter import Meter
from fedepth.plan import Stage
from fedepth.sizes import format_size
from fedepth.training.context import TrainingContext

UNBOUNDED = 1 << 50
OUTSIDE_HEAP_BYTES = 2 << 20  # compiled kernels, pages of libraries: they count, and no cap on the heap holds them
# What kernels ask for and never write to counts on the heap, and takes no memory: beyond what cost tables tell of it.
UNWRITTEN_BYTES = 16 << 20
# torch says "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory", and of that only the
# first 15 characters, which a short string of C++ holds, where memory for the rest is refused as well.
_OUT_OF_MEMORY = re.compile(
    r"(can't allocate memory|cannot allocate|unable to allocate|bad_alloc|out of memory|could not (create|execute) a|"
    r"\[enforce fail a)",
    re.I,
)
# A CPU's allocator says "you tried to allocate 4096 bytes", CUDA's "Tried to allocate 2.00 MiB".
_WANTED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SENTENCES = re.compile(r"(?:.*?\. ){2}")  # CUDA's allocator goes on for a page

Peaks = Mapping[Stage, int]  # of stages in their rehearsal


def releases(context: TrainingContext, stage: Stage) -> bool:
    """Whether a stage gives back what it frees at once, as in its rehearsal.

    An LSTM asks for three times what it writes to. A cap that lets it have that would let others keep as much.
    """
    return context.release_freed or unwritten_bytes(context, stage) > 0


def unwritten_bytes(context: TrainingContext, stage: Stage) -> int:
    """What a stage's kernels are known to ask for and never write to."""
    last = len(context.costs.units) if stage.frozen_suffix else stage.last + 1
    return sum(unit.unwritten.at(stage.micro_batch) for unit in context.costs.units[stage.first : last])


def heap_cap(context: TrainingContext, meter: Meter, rehearsed: Peaks, stage: Stage, budget: int) -> allocator.HeapCap:
    """What the plan's worst stage needed in its rehearsal, and a little for pages that are worth keeping.

    At most the budget, and all of it where the stage was not rehearsed. Stages that need less than the worst keep what
    they like up to its need.
    """
    cap = whole_heap(context, stage, budget)
    # The rehearsal released freed pages at once, so its peak is the need itself. The cap is the need and a margin and
    # not the whole budget: what an allocator keeps is then bounded, and the peak can be told in advance.
    if not releases(context, stage) and stage in rehearsed and allocator.can_be_capped():
        need = max(rehearsed.values())
        cap = min(cap, need + may_keep_bytes(need) + kernels_bytes(context.device))
    # What lies outside the heap is off every cap, also off one that is lowered later.
    return allocator.HeapCap(meter.baseline.heap_bytes - meter.outside_heap_bytes, cap)


def expected_bytes(context: TrainingContext, stage: Stage, rehearsed_bytes: int, budget: int) -> int:
    """What a stage is going to take: with the pages that it keeps, and no more than the budget that it is held to."""
    if not rehearsed_bytes:
        return needed_bytes(stage.predicted_peak_bytes)
    kept = 0 if releases(context, stage) else may_keep_bytes(rehearsed_bytes)
    return min(budget, rehearsed_bytes + kept)


def whole_heap(context: TrainingContext, stage: Stage, budget: int) -> int:
    """What the heap of a stage may come to in a budget."""
    if not context.enforce:
        return UNBOUNDED
    # The cap counts what is asked for, the budget what is written to. oneDNN asks for 20 MB for the gradient of a patch
    # embedding and leaves most of it untouched. Where freed pages are released at once, the heap follows what is in
    # use, so it may ask for that much more; the first step is held against the budget instead.
    unwritten = UNWRITTEN_BYTES + unwritten_bytes(context, stage)
    return kernels_bytes(context.device) + budget + (unwritten if releases(context, stage) else -OUTSIDE_HEAP_BYTES)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator has refused; torch and oneDNN have no type for that."""
    return isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def check_first_step(meter: Meter, context: TrainingContext, budget: int, index: int, stage: Stage) -> None:
    """Holds what a stage has taken by the end of its first step against the budget.

    Raises:
        OverBudgetError: it was more.
    """
    # Neither cap nor RLIMIT_DATA sees pages of files. After one step all tensors of the stage have been there once:
    # optimizer state is made before it, so that later steps need no more.
    peak = peak_bytes(meter, context.device)
    if peak > budget:
        raise OverBudgetError(
            f"stage {index} (units {stage.first}-{stage.last}) took {format_size(peak)} in its first step; the "
            f"prediction was {format_size(stage.predicted_peak_bytes)} and the budget is {format_size(budget)}",
            stage=index,
            miss_bytes=peak - budget,
        )


def over_budget(
    error: BaseException, index: int, stage: Stage, budget: int, peak: int, *, capped: bool
) -> BaseException:
    """An allocator's error as OverBudgetError; any other error as it is.

    Args:
        peak: what the stage had taken by then, in bytes.
        capped: a cap on the heap held, which counts what is asked for, and not what is written to.
    """
    if not is_out_of_memory(error):
        return error
    text = str(error)
    wanted = _WANTED.search(text)
    needed = peak + (int(float(wanted[1]) * _UNITS[wanted[2]]) if wanted else 0)
    met = "the cap on its heap" if capped else "its limit"
    return OverBudgetError(
        f"stage {index} (units {stage.first}-{stage.last}, micro-batch {stage.micro_batch}) met {met} in "
        f"a budget of {format_size(budget)}: {_shortened(text) or type(error).__name__}",
        stage=index,
        miss_bytes=max(0, needed - budget),
        capped=capped,
    )


def _shortened(text: str) -> str:
    """The first two sentences of the first line."""
    line = text.partition("\n")[0]
    found = _SENTENCES.match(line)
    return found[0].strip() if found else line
