"""The command `fedepth`: what needs neither a coordinator nor a device: questions about the method, exported models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fedepth.commands import JsonOption, command_line, examples, picture_maker
from fedepth.costs import Calibration, ModelCosts
from fedepth.errors import ConfigError, PlanError
from fedepth.estimate.peak import effective_batch, needed_bytes
from fedepth.estimate.timeline import Moment, timeline
from fedepth.files import NO_WORKING_DIRECTORY, NOT_JSON, has_working_directory, read_regular
from fedepth.job_sections import MOST_SAMPLES
from fedepth.models.catalog import named_spec
from fedepth.plan import MOST_MODELS, Ending, Plan, Policy
from fedepth.planning.explain import Alternative, Explanation, explain
from fedepth.printable import as_typed, printable
from fedepth.program import run_program
from fedepth.simulation.commands import compare_command, simulate_command
from fedepth.sizes import format_size, parse_size
from fedepth.task import MOST_BATCH, MOST_CLASSES, MOST_EPOCHS, Optimizer, TrainingSpec
from fedepth.terminal import console, print_json

if TYPE_CHECKING:
    from fedepth.export.infer import Prediction

_ENDINGS = {
    Ending.LAST_UNIT: "the last units are trained",
    Ending.FROZEN_SUFFIX: "the last units are untrained, the head is trained",
    Ending.FROZEN_HEAD: "the last units and the head are untrained",
}

app = command_line("fedepth", "Plan training within a memory budget; run exported models.")


@app.command("plan", epilog=examples("fedepth plan preresnet20 --budget 60MiB --policy paper --plot plan.png"))
def plan_command(
    model: Annotated[str, typer.Argument(help="A zoo model, torchvision:NAME, timm:NAME, or module:function.")],
    budget: Annotated[str, typer.Option(help="Memory that training may use, such as 300MiB.")],
    policy: Annotated[Policy, typer.Option(help="paper: the whole batch at once; auto: also micro-batches.")] = (
        Policy.AUTO
    ),
    batch: Annotated[int, typer.Option(min=1, max=MOST_BATCH, help="Samples per optimizer step.")] = 128,
    optimizer: Annotated[Optimizer, typer.Option(help="Sets how much state a weight has.")] = Optimizer.SGD,
    momentum: Annotated[float, typer.Option(min=0.0, max=1.0, help="For sgd; 0 keeps no state.")] = 0.9,
    input_shape: Annotated[
        str | None, typer.Option("--input", help="CxHxW, such as 3x32x32; zoo models have a default.")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, max=MOST_CLASSES, help="Number of classes.")] = 10,
    samples: Annotated[
        int, typer.Option(min=1, max=MOST_SAMPLES, help="Samples on the device; determines the cache size.")
    ] = 1024,
    epochs: Annotated[int, typer.Option(min=1, max=MOST_EPOCHS, help="Passes over the samples in a round.")] = 1,
    mutual: Annotated[
        int, typer.Option(min=1, max=MOST_MODELS, help="Models at most that distil from each other.")
    ] = 1,
    calibration: Annotated[
        Path | None, typer.Option(help="A device's calibration: output of its fedepth-client calibrate --json.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture to write (.png, .pdf or .svg): memory over time.", dir_okay=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the block plan for a budget, what each stage needs, and what other budgets would buy.

    The memory that kernels and the allocator take is estimated for a desktop with tcmalloc unless --calibration is
    given; a device in a job uses its own calibration.
    """
    device = _calibration(calibration) if calibration else Calibration()
    budget_bytes = parse_size(budget)
    save_timeline = picture_maker(plot, _load_timeline) if plot else None
    title = f"{model}, batch {batch}, {optimizer.value}, policy {policy.value}, budget {format_size(budget_bytes)}"
    training = TrainingSpec(batch, epochs, optimizer.value, 0.1, momentum, 0.0, 0.0, "none", 0, mutual=mutual)
    with console(stderr=True).status(f"Tracing {model}") as status:  # shows nothing where stderr is no terminal
        costs = replace(_trace(model, input_shape, classes, training), calibration=device)
        status.update("Comparing plans")
        try:
            found = explain(costs, budget_bytes=budget_bytes, training=training, sample_count=samples, policy=policy)
        except PlanError as error:
            raise PlanError(
                f"--budget {format_size(budget_bytes)} is too small for {model} at batch {batch}, policy "
                f"{policy.value}: the smallest plan needs {format_size(error.needed_bytes, round_up=True)}. "
                "Raise --budget to that, or lower --batch.",
                needed_bytes=error.needed_bytes,
                budget_bytes=budget_bytes,
            ) from None
        moments = timeline(costs, training, samples, found.plan)
        if plot and save_timeline:
            save_timeline(plot, moments, found.plan, title)
    if as_json:
        print_json(_fields(model, samples, training, found, moments))
    else:
        out = console()
        out.print(_stages(found.plan, title))
        out.print(_coarser(found, budget_bytes, effective_batch(costs, training, samples)))
        for line in _neighbours(found, budget_bytes):
            out.print(line, markup=False, soft_wrap=True)
        if plot:
            out.print(f"Memory over time: {printable(str(plot))}", markup=False, soft_wrap=True)


@app.command("infer", epilog=examples("fedepth infer digits.onnx photos/ --top 3"))
def infer_command(
    model: Annotated[Path, typer.Argument(help="An ONNX file that a job or fedepth-coordinator export wrote.")],
    files: Annotated[list[Path], typer.Argument(help="Images, or files with rows such as CSV; or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show of each file.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what an exported model says of images, or of the rows of files. Needs no torch.

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


def _load_timeline() -> Callable[[Path, Sequence[Moment], Plan, str], None]:
    from fedepth.estimate.plot import save_timeline

    return save_timeline


_MOST_CALIBRATION_BYTES = 1 << 20


def _calibration(path: Path) -> Calibration:
    try:
        return msgspec.convert(
            msgspec.json.decode(read_regular(path, _MOST_CALIBRATION_BYTES))["calibration"], Calibration
        )
    except (OSError, *NOT_JSON, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} holds no calibration ({error}); write it with: "
            f"fedepth-client calibrate --json > {as_typed(str(path))}"
        ) from None


def _trace(model: str, input_shape: str | None, classes: int, training: TrainingSpec) -> ModelCosts:
    spec = named_spec(model, input_shape, classes)
    if not has_working_directory():  # torch's libraries would end this process
        raise ConfigError(NO_WORKING_DIRECTORY)
    try:
        from fedepth.prepare import trace_model
    except ImportError as error:
        raise ConfigError(f"{error}. Tracing a model needs torch: pip install 'fedepth[train]'") from error

    return trace_model(spec, training, seed=0).traced.in_training(training).costs


def _fields(
    model: str, samples: int, training: TrainingSpec, found: Explanation, moments: Sequence[Moment]
) -> dict[str, Any]:
    explanation = msgspec.to_builtins(found)
    plan = explanation.pop("plan")
    peak = max(moments, key=lambda moment: moment.components.total)
    return {
        "model": model,
        "sample_count": samples,
        "training": msgspec.to_builtins(training),
        "plan": plan,
        "needed_bytes": needed_bytes(found.plan.predicted_peak_bytes),
        "explanation": explanation,
        "timeline": {
            "moments": len(moments),
            "peak_bytes": peak.components.total,
            "peak_stage": peak.stage,
            "peak_label": peak.label,
        },
    }


def _stages(plan: Plan, title: str) -> Table:
    """One row per stage; the components add up to the peak."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for name in ("units", "micro-\nbatch", "check-\npoint", "inputs\nin"):
        table.add_column(name, no_wrap=True)
    for name in (
        "para-\nmeters",
        "gradi-\nents",
        "optimizer\nstate",
        "activa-\ntions",
        "tempo-\nraries",
        "scratch",
        "cache",
        "peak\nMiB",
        "needs\nMiB",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in plan.stages:
        parts = stage.predicted
        sizes = (
            parts.parameters,
            parts.gradients,
            parts.optimizer_state,
            parts.activations,
            parts.temporaries,
            parts.scratch,
            parts.cache,
            parts.total,
            needed_bytes(parts.total),
        )
        table.add_row(
            stage.block,
            str(stage.micro_batch),
            "yes" if stage.checkpoint else "no",
            stage.cache.value,
            *(f"{size / (1 << 20):.1f}" for size in sizes),
        )
    notes = [f"Units left untrained: {plan.untrained_ranges}."] if plan.untrained else []
    if plan.models > 1:
        notes.append(f"{plan.models} models are trained, each distilling from the others; one of them is the update.")
    if plan.ending is Ending.FROZEN_SUFFIX:
        notes.append("The last block is trained through the untrained units behind it.")
    if plan.ending is Ending.FROZEN_HEAD:
        notes.append("The head stays at its global value: the preceding units are untrained.")
    table.caption = " ".join([*notes, "Needs: the predicted peak and its margin."])
    return table


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


def _coarser(found: Explanation, budget_bytes: int, batch: int) -> Table:
    """What plans with fewer stages need, and training everything at once."""
    table = Table(title="Why not coarser", box=SIMPLE_HEAD, title_justify="left")
    table.add_column("stages", justify="right")
    table.add_column("blocks", overflow="fold")
    table.add_column("needs", justify="right", no_wrap=True)
    table.add_column("over the budget", justify="right", no_wrap=True)

    def row(stages: str, blocks: str, needed: int) -> None:
        over = format_size(needed - budget_bytes, round_up=True) if needed > budget_bytes else "fits"
        table.add_row(stages, blocks, format_size(needed, round_up=True), over)

    for each in found.coarser:
        row(str(len(each.plan.stages)), each.plan.blocks, each.budget_bytes)
    row("full", f"all units at once, {batch} samples in one piece", found.full_training_bytes)
    return table


def _neighbours(found: Explanation, budget_bytes: int) -> list[str]:
    """What more and less memory would buy, in sentences."""
    if found.larger:
        size = format_size(found.larger.budget_bytes, round_up=True)
        more = format_size(found.larger.budget_bytes - budget_bytes, round_up=True)
        what = f"{_difference(found, found.larger)}: {_summary(found.larger.plan)}"
        lines = [f"More memory: with {size} ({more} more), {what}"]
    else:
        lines = ["More memory: no amount gives a clearly better plan."]
    least = format_size(found.least_bytes, round_up=True)
    less = format_size(budget_bytes - found.least_bytes)
    below = f"{_difference(found, found.smaller)}: {_summary(found.smaller.plan)}" if found.smaller else "nothing fits"
    lines.append(f"Less memory: as good down to {least} ({less} less); below, {below}")
    return lines


def _difference(found: Explanation, other: Alternative) -> str:
    """The first thing, in the planner's order, by which another plan is better or worse."""
    if other.plan.ending != found.plan.ending:
        return _ENDINGS[other.plan.ending]
    untrained, now = len(other.plan.untrained), len(found.plan.untrained)
    if untrained != now:
        return f"units untrained: {untrained} instead of {now}"
    for what, many, now in (
        ("stage", len(other.plan.stages), len(found.plan.stages)),
        ("model", other.plan.models, found.plan.models),
    ):
        if many != now:
            return f"{many} {what if many == 1 else what + 's'} instead of {now}"
    change = other.work / found.work - 1
    return f"about {abs(change):.0%} {'more' if change > 0 else 'less'} work"


def _summary(plan: Plan) -> str:
    sizes = sorted({stage.micro_batch for stage in plan.stages})
    text = f"{plan.blocks}, micro-batch {', '.join(map(str, sizes))}"
    return text + (", checkpointed" if any(stage.checkpoint for stage in plan.stages) else "")


if __name__ == "__main__":
    main()
