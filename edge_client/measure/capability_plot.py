"""What a device is capable of, as a picture. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edge_client.measure.capability import Capability, Measured, PlanRow, Verdict
from edge_client.measure.capability_tables import title
from fedepth.figures import new_figure, save_figure
from fedepth.sizes import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MIB = 1 << 20
# Okabe and Ito's colours, which people with colour blindness can tell apart.
_PREDICTED, _MEASURED, _SECONDS = "#56B4E9", "#0072B2", "#D55E00"
_FAR = 1.5  # free memory this many times the largest bar is named, but not shown
_NAMES = {
    Verdict.TOO_LARGE: "not run",
    Verdict.NO_PLAN: "no plan",
    Verdict.OVER_BUDGET: "over",
    Verdict.DIED: "died",
    Verdict.FAILED: "failed",
}


def save_capability(path: Path, report: Capability) -> None:
    """Writes a picture in the format of its suffix: the units on the left, the plans at their budgets on the right.

    Raises:
        ConfigError: the file cannot be written there.
    """
    width = 6 + 0.35 * len(report.units) + 1.1 * len(report.plans)
    figure = new_figure(max(12.0, width), 6)
    left, right = figure.subplots(1, 2, width_ratios=(max(5, len(report.units)), max(5, 1.6 * len(report.plans))))
    figure.suptitle(title(report))
    _draw_units(left, report)
    _draw_plans(right, report)
    save_figure(figure, path)


def _draw_units(axes: Axes, report: Capability) -> None:
    places = range(len(report.units))
    predicted = [row.predicted_peak_bytes / _MIB for row in report.units]
    measured = [_peak_mib(row.end.measured) for row in report.units]
    axes.bar([place - 0.2 for place in places], predicted, 0.4, color=_PREDICTED, label="predicted")
    axes.bar([place + 0.2 for place in places], measured, 0.4, color=_MEASURED, label="measured")
    for place, row in zip(places, report.units, strict=True):
        if row.end.verdict is not Verdict.TRAINED:
            axes.text(
                place + 0.2, measured[place], f" {_NAMES[row.end.verdict]}", ha="center", va="bottom", rotation=90
            )
    top = max(*predicted, *measured)
    free = report.device.budget_bytes / _MIB
    if free < _FAR * top:
        axes.axhline(free, color="black", linestyle="--", label=f"free, {format_size(report.device.budget_bytes)}")
    axes.set_ylim(0, 1.12 * max(top, free if free < _FAR * top else 0))
    axes.set_xticks(list(places), [f"{row.unit} {row.name}" for row in report.units], rotation=90, fontsize=8)
    axes.set_ylabel("peak memory, MiB")
    axes.set_title(f"Every unit alone, {report.units[0].stage.micro_batch} samples in one piece")
    axes.legend(loc="upper right", frameon=False)


def _draw_plans(axes: Axes, report: Capability) -> None:
    """Budgets as outlines that the measured peaks fill; the time on an axis of its own."""
    places = list(range(len(report.plans)))
    budgets = [row.budget_bytes / _MIB for row in report.plans]
    measured = [_peak_mib(row.end.measured) for row in report.plans]
    axes.bar(places, budgets, 0.6, fill=False, edgecolor="black", linestyle="--", label="budget")
    axes.bar(places, measured, 0.6, color=_MEASURED, label="measured peak")
    ticks = [row.predicted_peak_bytes / _MIB for row in report.plans]
    axes.hlines(
        ticks, [place - 0.3 for place in places], [place + 0.3 for place in places], color=_PREDICTED, label="predicted"
    )
    for place, row in zip(places, report.plans, strict=True):
        if row.end.verdict is not Verdict.TRAINED:
            axes.text(place, budgets[place], _NAMES[row.end.verdict], ha="center", va="bottom")
    axes.set_ylim(0, 1.2 * max(budgets))
    axes.set_xticks(places, [_named(row) for row in report.plans], fontsize=8)
    axes.set_ylabel("memory, MiB")
    axes.set_title(f"The best plan for a budget, policy {report.policy.value}")

    timed = [(place, row.end.measured) for place, row in zip(places, report.plans, strict=True) if row.end.measured]
    handles, labels = axes.get_legend_handles_labels()
    if timed:
        seconds = [measured.seconds_per_1000_samples for _, measured in timed]
        clock = axes.twinx()
        (line,) = clock.plot([place for place, _ in timed], seconds, "o-", color=_SECONDS)
        clock.set_ylim(0, 1.35 * max(seconds))
        clock.set_ylabel("seconds for 1,000 samples", color=_SECONDS)
        clock.tick_params(axis="y", colors=_SECONDS)
        handles, labels = [*handles, line], [*labels, "time"]
    axes.legend(handles, labels, loc="upper left", frameon=False, ncols=2)


def _named(row: PlanRow) -> str:
    size = format_size(row.budget_bytes)
    if row.plan is None:
        return size
    stages = len(row.plan.stages)
    sizes = sorted({stage.micro_batch for stage in row.plan.stages})
    lines = [
        size,
        f"{stages} {'stage' if stages == 1 else 'stages'}",
        f"micro-batch {sizes[0]}" + (f"-{sizes[-1]}" if len(sizes) > 1 else ""),
    ]
    if any(stage.checkpoint for stage in row.plan.stages):
        lines.append("checkpointed")
    if row.plan.untrained:
        lines.append(f"{len(row.plan.untrained)} untrained")
    return "\n".join(lines)


def _peak_mib(measured: Measured | None) -> float:
    return measured.measured_peak_bytes / _MIB if measured else 0.0
