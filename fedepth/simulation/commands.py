"""The commands `fedepth simulate` and `fedepth compare`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fedepth.commands import JsonOption, data_place, picture_maker
from fedepth.errors import ConfigError
from fedepth.files import not_writable
from fedepth.job import model_spec
from fedepth.job_sections import MOST_DEVICES, MOST_SEED, MOST_WORKERS
from fedepth.printable import printable
from fedepth.sizes import format_size
from fedepth.terminal import console, print_json

if TYPE_CHECKING:
    from fedepth.export.onnx import ExportReport
    from fedepth.simulation.compare import Comparison, Spread
    from fedepth.simulation.record import RoundLine
    from fedepth.simulation.setup import Options, Simulation


def simulate_command(
    job: Annotated[Path, typer.Argument(help="A job file, as a coordinator serves it.")],
    data: Annotated[
        str,
        typer.Option(
            parser=data_place, metavar="PATH", help='Folder or file with the training data of all clients, or "digits".'
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the results; give it again to continue a run.")],
    clients: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_DEVICES, help="Number of clients, unless --partition determines it."),
    ] = None,
    partition: Annotated[
        str,
        typer.Option(
            help="iid, dirichlet:ALPHA (equal sizes), dirichlet-unbalanced:ALPHA, shards:EACH, folder:LEVEL (of "
            "image files: CLASS/OWNER/… is 1), csv:FILE (client, and file or index), or file:FILE (a partition.json)."
        ),
    ] = "iid",
    tiers: Annotated[
        str, typer.Option(help="Memory of the clients: fair, lack or surplus (measured), or full for no limit.")
    ] = "full",
    budgets: Annotated[
        Path | None,
        typer.Option(
            help="Memory of real devices instead: output of fedepth-client probe --json, or a run's tiers.json."
        ),
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="JSON lines: speeds, links, absences, dropouts.")] = None,
    plans: Annotated[Path | None, typer.Option(help="JSON: plans by client that are trained as they are.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MOST_SEED, help="Random seed; default: the job's.")] = None,
    workers: Annotated[
        int, typer.Option(min=0, max=MOST_WORKERS, help="Clients that train at once; 0: one for each core.")
    ] = 0,
    threads: Annotated[
        int, typer.Option(min=1, max=MOST_WORKERS, help="Of each worker; another number gives other last digits.")
    ] = 1,
    enforce: Annotated[
        bool,
        typer.Option(help="Hold every client to its budget, as a device does; see docs/simulation.md on last digits."),
    ] = False,
    engine: Annotated[str, typer.Option(help="local, or ray for a Ray cluster that sees the same folders.")] = "local",
    name: Annotated[str, typer.Option(show_default=False, help="By which runs are compared; default: the job's.")] = "",
    onnx: Annotated[
        Path | None, typer.Option(help="ONNX file to write the last weights to, compared with torch.", dir_okay=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a job with many simulated clients: the training, planning and averaging that real devices do.

    Results are the same, bit for bit, for any number of workers, and after an interruption: the same command goes on
    where it stopped. rounds.jsonl in the output folder has one line for every round.
    """
    try:
        from fedepth.simulation.setup import Options
        from fedepth.simulation.simulate import simulate
    except ImportError as error:
        raise ConfigError(f"{error}. A simulation needs torch: pip install 'fedepth[train]'") from error
    export_weights = _exporter(onnx) if onnx is not None else None
    options = Options(
        job=job, data=data, output=output, clients=clients, partition=partition, tiers=tiers, budgets=budgets,
        trace=trace, plans=plans, seed=seed, workers=workers, threads=threads, enforce=enforce, name=name,
        engine=engine,
    )  # fmt: skip
    lines = simulate(options, drawn=_draw_partition)
    _draw_runs(output / "accuracy.png", [output])
    report = export_weights(options, lines[-1], onnx) if export_weights and onnx else None
    if as_json:
        print_json(lines)
        return
    out = console()
    last = lines[-1]
    known = [line.accuracy for line in lines if line.published and line.accuracy is not None]
    if known:  # of the weights in force, which are those of an earlier round where the last was not published
        out.print(f"accuracy {known[-1]:.2%} after round {last.round}, at best {max(known):.2%}")
    if last.note:
        out.print(f"round {last.round} was not published: {printable(last.note)}", markup=False, soft_wrap=True)
    weights = output / "weights" / f"round-{last.weights_round:04d}.safetensors"
    out.print(f"weights: {printable(str(weights))}", markup=False, soft_wrap=True)
    if report is not None:
        text = (
            f"{report.path}: {format_size(report.size_bytes)}, compared on {report.compared_on}: largest difference "
            f"{report.parity_max_abs:.1e}, same top answer for {report.top1_equal} of {report.samples}"
        )
        out.print(printable(text), markup=False, soft_wrap=True)


def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of fedepth simulate, finished or not.")],
    plot: Annotated[
        Path | None, typer.Option(help="Picture to write (.png, .pdf or .svg): accuracy by round.", dir_okay=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare simulations: accuracy, work and memory. Runs of one name count as seeds of one set-up.

    Counted are the rounds that all runs of a name have closed. Accuracies are means and standard deviations over seeds.
    """
    from fedepth.simulation.compare import compare, read_run

    twice = [run for run, times in Counter(run.resolve() for run in runs).items() if times > 1]
    if twice:
        raise ConfigError(f"{printable(str(twice[0]))} is given more than once, and would count as so many seeds")
    draw = picture_maker(plot, _load_plot) if plot is not None else None
    found = compare([read_run(run) for run in runs])
    if plot is not None and draw is not None:
        draw.save_runs(plot, [read_run(run) for run in runs])
    if as_json:
        print_json(found)
    else:
        console().print(_table(found))


def _exporter(output: Path) -> Callable[[Options, RoundLine, Path], ExportReport]:
    """What writes `output` in the end; whether that can be done is seen before a long simulation.

    Raises:
        ConfigError: it cannot.
    """
    why = not_writable(output)
    if why or output.name == "labels.txt":
        raise ConfigError(f"--onnx: {why or 'labels.txt is written beside the model; give it another name'}")
    try:
        from fedepth.simulation.onnx import export_weights
    except ImportError as error:
        extra = "pip install 'fedepth[coordinator]'"
        raise ConfigError(f"{error}. --onnx needs onnx, onnxscript and onnxruntime: {extra}") from error
    return export_weights


def _table(found: Sequence[Comparison]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("name", overflow="fold")
    for name in ("seeds", "rounds", "accuracy", "best", "steps", "samples", "seconds", "down", "up"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("peak by tier", overflow="fold")
    for each in found:
        table.add_row(
            Text(printable(each.name)),
            str(len(each.seeds)),
            str(each.rounds),
            _percent(each.final),
            _percent(each.best),
            f"{each.steps:.0f}",
            f"{each.samples_seen:.0f}",
            f"{each.seconds:.0f}",
            format_size(round(each.bytes_down)),
            format_size(round(each.bytes_up)),
            Text(", ".join(f"{printable(tier)}: {format_size(peak)}" for tier, peak in each.peaks.items())),
        )
    return table


def _percent(value: Spread | None) -> str:
    return "" if value is None else f"{value.mean:.2%} ± {value.std:.2%}"


def _draw_partition(simulation: Simulation) -> None:
    """Leaves a picture of who has what beside it, where pictures can be made."""
    from fedepth.simulation.partitions import class_counts
    from fedepth.simulation.record import PARTITION_PICTURE

    path = simulation.record.folder / PARTITION_PICTURE
    plot = _plotting()
    if plot is not None and not path.exists():
        classes = model_spec(simulation.config).classes
        counts = class_counts(simulation.partition, simulation.labels, len(classes))
        title = f"{simulation.partition.how}, seed {simulation.partition.seed}: samples by class"
        plot.save_partition(path, counts, classes, title)


def _draw_runs(path: Path, runs: Sequence[Path]) -> None:
    from fedepth.simulation.compare import read_run

    plot = _plotting()
    if plot is not None:
        plot.save_runs(path, [read_run(run) for run in runs])


def _plotting() -> Any:
    """The module that draws; None where matplotlib is missing, which a simulation can do without."""
    try:
        return _load_plot()
    except ImportError:
        return None


def _load_plot() -> Any:
    from fedepth.simulation import plot

    return plot
