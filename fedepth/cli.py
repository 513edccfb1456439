"""The command `fedepth`: what needs neither a coordinator nor a device: questions about the method, exported models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fedepth.commands import JsonOption, command_line, examples
from fedepth.errors import ConfigError
from fedepth.plan_command import plan_command
from fedepth.printable import printable
from fedepth.program import run_program
from fedepth.simulation.commands import compare_command, simulate_command
from fedepth.terminal import console, print_json

if TYPE_CHECKING:
    from fedepth.export.infer import Prediction

app = command_line("fedepth", "Plan training within a memory budget; run exported models.")


app.command(
    "plan",
    epilog=examples(
        "fedepth plan preresnet20 --budget 60MiB --policy paper --plot plan.png",
        "fedepth plan job.toml --budget 60MiB --samples 500",
    ),
)(plan_command)


@app.command("infer", epilog=examples("fedepth infer digits.onnx photos/ --top 3"))
def infer_command(
    model: Annotated[Path, typer.Argument(help="An ONNX file that a job or fedepth-coordinator export wrote.")],
    files: Annotated[list[Path], typer.Argument(help="Images, or files with rows such as CSV; or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show of each file.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what an exported model predicts for images, or for the rows of files. Needs no torch.

    Images and rows are read as in training and normalised as the file says. A file or row that cannot be read is named,
    and the exit code is then 1.
    """
    try:
        from fedepth.export import infer
    except ImportError as error:
        raise ConfigError(
            f"{error}. Running an exported model needs onnxruntime: pip install 'fedepth[infer]'"
        ) from error

    deployed = infer.open_deployed(model)
    if deployed.spec.columns is not None:
        found, left_out = infer.row_files(files)
        predictions = list(infer.classify_rows(deployed, found, top))
    else:
        found, left_out = infer.image_files(files)
        predictions = list(infer.classify(deployed, found, top))
    if as_json:
        print(infer.as_json(deployed, predictions))
    elif any(each.classes for each in predictions):
        console().print(_predictions(predictions))
    for row in left_out:
        console(stderr=True, soft_wrap=True).print(printable(f"left out: {row}"), markup=False)
    unread = [each for each in predictions if each.error]
    for each in unread:
        console(stderr=True, soft_wrap=True).print(printable(f"fedepth: {each.error}"), markup=False)
    if unread:
        raise typer.Exit(1)


app.command(
    "simulate",
    epilog=examples(
        "fedepth simulate job.toml --data digits --clients 20 --output runs/digits",
        "fedepth simulate job.toml --data cifar/ --clients 100 --partition dirichlet:0.3 --tiers fair --output runs/f",
    ),
)(simulate_command)
app.command("compare", epilog=examples("fedepth compare runs/fair-1 runs/fair-2 runs/full --plot compared.png"))(
    compare_command
)


@app.command("columns", epilog=examples("fedepth columns people.csv --label income"))
def columns_command(
    files: Annotated[list[Path], typer.Argument(help="CSV, JSON-lines or Parquet files with the same columns.")],
    label: Annotated[str, typer.Option(help="The column with the class.")],
    categorical: Annotated[
        list[str] | None, typer.Option(help="A column with numbers that are categories; may be given several times.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the section [table] of a job file for the columns of a file.

    Columns of numbers are given with mean and standard deviation, those with at most 50 different values with these
    values; all others are left out and named.
    """
    try:
        from fedepth.data.columns import look_at_columns, table_section
    except ImportError as error:
        raise ConfigError(f"{error}. Reading tables needs numpy: pip install 'fedepth[infer]'") from error

    columns, damaged, examples = look_at_columns(files)
    section = table_section(columns, label, categorical or ())
    if as_json:
        found = [
            {
                "name": each.name,
                "missing": each.missing,
                "numeric": each.is_numeric,
                **({"mean": each.mean, "std": each.std} if each.is_numeric else {}),
                **({"values": dict(each.values)} if each.is_categorical else {}),
            }
            for each in columns
        ]
        print_json({"columns": found, "damaged": damaged, "section": section})
    else:
        print(section, end="")
    if damaged:
        what = "1 row is" if damaged == 1 else f"{damaged} rows are"
        text = f"{what} damaged and left out, such as: {examples[0]}"
        console(stderr=True, soft_wrap=True).print(text, markup=False)


def main() -> None:
    """Runs a command and ends; see `fedepth.program`."""
    run_program("fedepth", app)


def _predictions(predictions: Sequence[Prediction]) -> Table:
    """One row per class of each file that could be read."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("file", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    for each in predictions:
        for place, (name, probability) in enumerate(each.classes):
            where = f"{each.file}:{each.line}" if each.line else f"{each.file}"
            file = "" if place else printable(where)
            table.add_row(Text(file), Text(printable(name)), f"{probability:.1%}")
    return table


if __name__ == "__main__":
    main()
