"""Tables and curves for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from benchmarks.federation import DeviceFigures
from fedepth.sizes import format_size

_BARS = "▁▂▃▄▅▆▇█"


def device_table(devices: Sequence[DeviceFigures]) -> Table:
    """One row per device: what it had, what was planned, what was measured."""
    table = Table(title="devices")
    for column in (
        "device",
        "available",
        "budget",
        "plan",
        "predicted peak",
        "measured peak",
        "samples",
        "updates",
        "seconds",
    ):
        table.add_column(column, justify="left" if column in ("device", "plan") else "right")
    for device in devices:
        table.add_row(
            device.name,
            format_size(device.available_bytes),
            format_size(device.budget_bytes),
            device.blocks,
            format_size(device.predicted_peak_bytes),
            format_size(device.measured_peak_bytes),
            str(device.samples),
            str(device.updates),
            f"{device.seconds:.1f}",
        )
    return table


def curve(accuracies: Sequence[float]) -> str:
    """The accuracy after every round as bars and numbers."""
    bars = "".join(_BARS[min(len(_BARS) - 1, int(value * len(_BARS)))] for value in accuracies)
    return f"accuracy by round {bars}  " + " ".join(f"{value:.0%}" for value in accuracies)
