"""What a device is capable of, as tables for people. Loads rich."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.table import Table

from edge_client.measure.capability import Capability, End, Measured, PlanRow, UnitRow, Verdict
from fedepth.plan import Plan, Stage
from fedepth.sizes import format_size

_BUSY = 0.3  # of all cores; from here on, times are not the device's own
_NUMBERS = ("predicted\nMiB", "rehearsed\nMiB", "measured\nMiB", "seconds\nper step", "per 1,000\nsamples")
_NOT_TRAINED = {
    Verdict.OVER_BUDGET: "over its budget: ",
    Verdict.DIED: "the trainer died: ",
    Verdict.FAILED: "failed: ",
}


def title(report: Capability) -> str:
    """What was trained and how, in one line."""
    training = report.training
    return (
        f"{report.model} on this device: batch {training.batch}, {training.optimizer}, policy {report.policy.value}, "
        f"{report.sample_count} samples, {format_size(report.device.budget_bytes)} free"
    )


def tables(report: Capability) -> Iterator[Table]:
    """The units, and the plans."""
    units = _table(f"{title(report)}\n\nEvery unit alone, the batch in one piece")
    units.add_column("unit", justify="right")
    units.add_column("name", no_wrap=True)
    _add_numbers(units)
    for unit in report.units:
        units.add_row(str(unit.unit), unit.name, *_numbers(unit), in_words(unit.end))
    units.caption = "Predicted: before the margin. Seconds count the computation of a stage's inputs too.\n"
    yield units

    plans = _table("The best plan for a budget, with the budget as its limit")
    plans.add_column("budget\nMiB", justify="right", no_wrap=True)
    plans.add_column("blocks", overflow="fold", min_width=16)
    plans.add_column("micro-\nbatch", justify="right", no_wrap=True)
    _add_numbers(plans)
    for plan in report.plans:
        blocks, sizes = (shown_blocks(plan.plan), micro_batches(plan.plan)) if plan.plan else ("", "")
        plans.add_row(_mib(plan.budget_bytes), blocks, sizes, *_numbers(plan), in_words(plan.end))
    plans.caption = (
        f"c: checkpointed. Training all units at once, the batch in one piece, needs "
        f"{format_size(report.full_training_bytes, round_up=True)}."
    )
    if report.busy > _BUSY:
        plans.caption += (
            f"\nOther programs kept about {report.busy:.0%} of this device busy, so that times are too long and uneven."
        )
    yield plans


def micro_batches(plan: Plan) -> str:
    """The micro-batch of every stage; once where all have the same."""
    sizes = [_size(stage) for stage in plan.stages]
    return ", ".join(sizes[:1] if len(set(sizes)) == 1 else sizes)


def shown_blocks(plan: Plan) -> str:
    """The plan's blocks, and how many units keep their global value."""
    blocks = plan.blocks.partition(" (")[0]
    return f"{blocks} ({len(plan.untrained)} untrained)" if plan.untrained else blocks


def in_words(end: End) -> str:
    return "trained" if end.verdict is Verdict.TRAINED else _NOT_TRAINED.get(end.verdict, "") + end.message


def _table(name: str) -> Table:
    return Table(title=name, box=SIMPLE_HEAD, title_justify="left", caption_justify="left")


def _add_numbers(table: Table) -> None:
    for name in _NUMBERS:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold", min_width=9)


def _numbers(row: UnitRow | PlanRow) -> tuple[str, ...]:
    predicted = _mib(row.predicted_peak_bytes) if row.predicted_peak_bytes else ""
    return (predicted, *_measured(row.end.measured))


def _measured(measured: Measured | None) -> tuple[str, str, str, str]:
    if measured is None:
        return "", "", "", ""
    return (
        _mib(measured.rehearsed_peak_bytes),
        _mib(measured.measured_peak_bytes),
        f"{measured.seconds_per_step:.3f}",
        f"{measured.seconds_per_1000_samples:.1f}",
    )


def _size(stage: Stage) -> str:
    return f"{stage.micro_batch} c" if stage.checkpoint else str(stage.micro_batch)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f}"
