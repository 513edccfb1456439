"""A plan's predicted memory over time as a picture. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from fedepth.estimate.timeline import Moment
from fedepth.figures import new_figure, save_figure
from fedepth.plan import PeakComponents, Plan
from fedepth.sizes import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MIB = 1 << 20
_COMPONENTS = tuple(field.name for field in fields(PeakComponents))
# Okabe and Ito's colours, which people with colour blindness can tell apart; what stays for the whole stage is darker.
_COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#BBBBBB", "#009E73")
_MANY_STAGES = 6  # from here on, a stage is too narrow for more than its units
_FAR = 2.5  # a budget this many times the peak is named, but not shown
_LETTER = 0.006  # about what a letter of a phase's name takes of the width


def save_timeline(path: Path, moments: Sequence[Moment], plan: Plan, title: str) -> None:
    """Writes a picture in the format of its suffix: the components over the moments of every stage, and the budget.

    Raises:
        ConfigError: the file cannot be written there.
    """
    figure = new_figure(12, 6)
    axes = figure.add_subplot()
    edges = range(len(moments) + 1)
    heights = [
        [getattr(moment.components, name) / _MIB for moment in (*moments, moments[-1])]  # the last step has an end too
        for name in _COMPONENTS
    ]
    labels = [name.replace("_", " ") for name in _COMPONENTS]
    axes.stackplot(edges, *heights, labels=labels, colors=_COLOURS[: len(labels)], step="post", linewidth=0)
    axes.set_xlim(0, len(moments))
    axes.set_ylabel("predicted memory, MiB")
    axes.set_title(title, pad=12)
    _mark_budget(axes, plan)
    _mark_stages(axes, moments, plan)
    _name_phases(axes, moments)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right upper", frameon=False)
    save_figure(figure, path)


def _mark_budget(axes: Axes, plan: Plan) -> None:
    budget, peak = plan.budget_bytes / _MIB, plan.predicted_peak_bytes / _MIB
    name = f"budget, {format_size(plan.budget_bytes)}"
    line = axes.axhline(budget, color="black", linestyle="--", linewidth=1.5)
    if budget < _FAR * peak:
        axes.set_ylim(0, budget * 1.2)  # the stages' names stand above the budget
        line.set_label(name)
    else:  # an axis up to there would press the plan flat
        axes.set_ylim(0, peak * 1.3)
        line.set_label(f"{name} (above)")


def _mark_stages(axes: Axes, moments: Sequence[Moment], plan: Plan) -> None:
    """A line where a stage begins; its units, how it runs, and its peak."""
    many = len(plan.stages) >= _MANY_STAGES
    start = 0
    for index, group in groupby(moments, key=lambda moment: moment.stage):
        stage, width = plan.stages[index], len(list(group))
        if start:
            axes.axvline(start, color="black", linewidth=0.8)
        name = stage.block if many else f"units {stage.block}\nmicro-batch {stage.micro_batch}"
        if stage.checkpoint and not many:
            name += ", checkpointed"
        peak = stage.predicted_peak_bytes / _MIB
        text = f"{name}\n{peak:.1f}" if many else f"{name}\npeak {peak:.1f} MiB"
        middle = start + width / 2
        axes.text(
            middle, 0.99, text, transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=8 if many else 9
        )
        start += width


def _name_phases(axes: Axes, moments: Sequence[Moment]) -> None:
    """The phases of every stage below the axis, with a tick where one begins."""

    def phase(moment: Moment) -> tuple[int, str]:
        word = moment.label.split()[0]
        # With checkpointing the backward pass alternates between running a unit again and its gradients.
        return moment.stage, "backward" if word == "again" else word

    start = 0
    middles: list[float] = []
    names: list[str] = []
    widths: list[int] = []
    for (_, name), group in groupby(moments, key=phase):
        width = len(list(group))
        middles.append(start + width / 2)
        names.append(name)
        widths.append(width)
        start += width
    begins = [middle - width / 2 for middle, width in zip(middles, widths, strict=True)]
    upright = any(width < _LETTER * len(name) * len(moments) for width, name in zip(widths, names, strict=True))
    axes.set_xticks(begins, minor=True)
    axes.set_xticks(middles, names, rotation=90 if upright else 0, fontsize=8)
    axes.tick_params(axis="x", which="major", length=0)
    axes.set_xlabel("for every stage: building its inputs, then one step, unit by unit")
