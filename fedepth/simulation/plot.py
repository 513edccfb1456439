"""Partitions and results as pictures. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from fedepth.figures import new_figure, save_figure
from fedepth.printable import printable
from fedepth.simulation.compare import Run

# Okabe and Ito's colours, which people with colour blindness can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
_MOST_NAMES = 12  # of classes in a legend


def save_partition(path: Path, counts: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> None:
    """Writes a picture, in the format that its name ends in: a column for every client, its samples stacked by class.

    Args:
        counts: samples of each class (columns) at each client (rows).

    Raises:
        ConfigError: the file cannot be written there.
    """
    figure = new_figure(12, 5)
    axes = figure.add_subplot()
    # One area for each class, and no bar for each client: of a thousand clients that would be ten thousand objects.
    edges = [number - 0.5 for number in range(len(counts) + 1)]
    heights = [[row[label] for row in (*counts, counts[-1])] for label in range(len(classes))]
    shades = [
        _COLOURS[label] if len(classes) <= len(_COLOURS) else _shade(label, len(classes))
        for label in range(len(classes))
    ]
    names = [printable(name) for name in classes]
    axes.stackplot(edges, *heights, labels=names, colors=shades, step="post", linewidth=0)
    axes.set_xlim(-0.5, len(counts) - 0.5)
    axes.set_xlabel("client")
    axes.set_ylabel("samples")
    axes.set_title(printable(title))
    if len(classes) <= _MOST_NAMES:
        figure.legend(loc="outside right upper", frameon=False)
    save_figure(figure, path)


def save_runs(path: Path, runs: Sequence[Run]) -> None:
    """Writes a picture, in the format that its name ends in: accuracy by round and by samples seen.

    Of runs with one name it shows the mean, and a band of one standard deviation.

    Raises:
        ConfigError: the file cannot be written there.
    """
    figure = new_figure(12, 5)
    by_round, by_samples = figure.subplots(1, 2, sharey=True)
    for number, name in enumerate(dict.fromkeys(run.name for run in runs)):
        same = [run for run in runs if run.name == name]
        colour = _COLOURS[number % len(_COLOURS)]
        rounds = min(len(run.accuracies) for run in same)
        if not rounds:
            continue
        histories = [[accuracy for _, accuracy in run.accuracies[:rounds]] for run in same]
        means = [statistics.fmean(values) for values in zip(*histories, strict=True)]
        widths = [statistics.stdev(values) if len(same) > 1 else 0.0 for values in zip(*histories, strict=True)]
        numbers = [number for number, _ in same[0].accuracies[:rounds]]
        samples = [statistics.fmean(_samples_seen(run, number) for run in same) for number in numbers]
        label = printable(name) if len(same) == 1 else f"{printable(name)} ({len(same)} seeds)"
        for axes, places in ((by_round, [float(number) for number in numbers]), (by_samples, samples)):
            axes.plot(places, means, color=colour, label=label)
            low = [mean - width for mean, width in zip(means, widths, strict=True)]
            high = [mean + width for mean, width in zip(means, widths, strict=True)]
            axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    by_round.set_xlabel("round")
    by_round.set_ylabel("accuracy on the test data")
    by_samples.set_xlabel("samples seen by clients")
    by_round.grid(alpha=0.3)
    by_samples.grid(alpha=0.3)
    handles, _ = by_round.get_legend_handles_labels()
    if handles:
        by_round.legend(frameon=False)
    save_figure(figure, path)


def _samples_seen(run: Run, number: int) -> float:
    return math.fsum(line.samples_seen for line in run.rounds if line.round <= number)


def _shade(label: int, classes: int) -> tuple[float, float, float]:
    """Neighbouring labels in colours that differ."""
    part = (label * 0.618034) % 1.0
    return 0.2 + 0.7 * part, 0.25 + 0.5 * ((part * 3) % 1.0), 0.9 - 0.7 * (label / max(1, classes - 1))
