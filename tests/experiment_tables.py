"""The tables of docs/benchmarks.md with the figures of benchmarks.experiments: `python -m tests.experiment_tables`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.pages import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "experiments.json"
MIB = 1 << 20
_SMALL = 16  # a micro-batch, no batch


def tables() -> Iterator[tuple[str, list[str]]]:
    """The lines of a table for every experiment that has figures."""
    known = json.loads(RESULTS.read_bytes()) if RESULTS.exists() else {}
    for name, found in known.items():
        columns = ["set-up", "trains", "accuracy, %", "best, %", "peak, MiB", "gradient steps", "processor s"]
        if any("published_accuracy_mean" in each for each in found["setups"].values()):
            columns.insert(4, "published best, %")
        rows = [_row(setup, figures, columns) for setup, figures in found["setups"].items()]
        yield name, [_line(columns), _line(["---"] * len(columns)), *map(_line, rows)]


def _row(name: str, figures: dict[str, Any], columns: list[str]) -> list[str]:
    cells = {
        "set-up": name,
        "trains": _plan(figures),
        "accuracy, %": _percent(figures, ""),
        "best, %": _percent(figures, "best_"),
        "published best, %": _percent(figures, "published_"),
        "peak, MiB": " and ".join(f"{peak / MIB:.1f}" for peak in _peaks(figures)),
        "gradient steps": _number(figures, "gradient_steps"),
        "processor s": _number(figures, "processor_seconds"),
    }
    return [cells[column] for column in columns]


def _number(figures: dict[str, Any], name: str) -> str:
    return f"{figures[name]:,.0f}" if name in figures else ""  # not run yet


def _percent(figures: dict[str, Any], kind: str) -> str:
    mean, std = (figures.get(f"{kind}accuracy_{each}") for each in ("mean", "std"))
    if mean is None:
        return ""
    one = kind != "published_" and figures["seeds"] == 1
    return f"{100 * mean:.1f}" if one else f"{100 * mean:.1f} ± {100 * std:.1f}"


def _plan(figures: dict[str, Any]) -> str:
    if "weak" in figures:
        return f"{figures['weak_clients']} clients: {_plan(figures['weak'])}; others: {_plan(figures['others'])}"
    if "blocks" not in figures:
        return "everything"
    wide = "" if figures["width"] == 1 else f", {figures['width']:.4g} as wide"
    pieces = f", {figures['micro_batch']} at once" if figures["micro_batch"] < _SMALL else ""
    return f"{figures['blocks'].replace(' | ', ' · ')}{wide}{pieces}"


def _peaks(figures: dict[str, Any]) -> list[int]:
    if "weak" in figures:
        return [figures[each]["measured_peak_bytes"] for each in ("weak", "others")]
    by_tier = figures.get("measured_peak_bytes_by_tier", {})
    return [figures["measured_peak_bytes"]] if "measured_peak_bytes" in figures else list(by_tier.values())


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for title, lines in tables():
        print(title, *lines, sep="\n", end="\n\n")
