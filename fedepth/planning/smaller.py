"""What a plan may need after another one has gone over its budget."""

from __future__ import annotations

from fedepth.estimate.peak import needed_bytes
from fedepth.plan import Plan

SMALLER_PLANS = 4  # that are tried, each smaller than the one before
_SMALLEST_STEP = 0.05


def smaller_limit(plan: Plan, miss_bytes: int, least_bytes: int = 0, tries: int = 1) -> int:
    """What a plan may need after `plan` has gone over its budget by `miss_bytes` (0 if nobody could tell).

    Counted from what the plan was predicted to need, not from the budget, which may lie far above it: the next plan is
    then another one for certain. The more `tries` have failed, the larger the least step: it doubles. Where the miss is
    larger than all that could be saved, the smallest plan, which needs `least_bytes`, is still worth a try.
    """
    needed = needed_bytes(plan.predicted_peak_bytes)
    step = _SMALLEST_STEP * 2 ** (tries - 1)
    limit = max(0, needed - max(miss_bytes, int(needed * step)))
    return max(limit, least_bytes) if least_bytes < needed else limit
