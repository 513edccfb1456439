"""The figures of a run, from its scenarios, and the file that they are kept in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LISTS = ("lost", "doubled", "discarded", "unexpected", "failures", "wasted")


def summed(scenarios: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All figures. Counts are of faults that really happened; each list names the seed."""
    by_kind: Counter[str] = Counter()
    for each in scenarios.values():
        by_kind[each["kind"]] += each.get("fired", 0)
    lists = {
        name: [(int(seed), each["kind"], what) for seed, each in scenarios.items() for what in each.get(name, ())]
        for name in _LISTS
    }
    return {
        "faults": by_kind.total(),
        "by_kind": dict(sorted(by_kind.items())),
        "lost_updates": len(lists["lost"]),
        "double_counted": len(lists["doubled"]),
        "acknowledged_and_discarded": len(lists["discarded"]),
        "stuck_rounds": sum(each.get("stuck", 0) for each in scenarios.values()),
        "trainings_wasted": [{"seed": seed, "reason": what} for seed, _, what in lists["wasted"]],
        "unexpected": [{"seed": seed, "what": what} for seed, _, what in lists["unexpected"]],
        "bit_for_bit": {
            "compared": sum(each.get("compared", 0) for each in scenarios.values()),
            "equal": sum(each.get("equal", 0) for each in scenarios.values()),
        },
        "seconds": round(sum(each.get("seconds", 0) for each in scenarios.values()), 1),
        "failures": [{"seed": seed, "kind": kind, "what": what} for seed, kind, what in lists["failures"]],
    }


def write(path: Path, scenarios: Mapping[str, Mapping[str, Any]]) -> None:
    """Replaces the file; a run that is interrupted goes on from it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({**summed(scenarios), "scenarios": scenarios}, indent=1) + "\n")
    partial.replace(path)
