"""The command `fedepth plan`: what a budget allows, for a model by its name or for that of a job file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedepth import job as jobs
from fedepth.commands import JsonOption, picture_maker
from fedepth.costs import Calibration, ModelCosts
from fedepth.errors import ConfigError, PlanError
from fedepth.estimate.peak import effective_batch, needed_bytes
from fedepth.estimate.timeline import Moment, timeline
from fedepth.files import NO_WORKING_DIRECTORY, NOT_JSON, has_working_directory, read_regular
from fedepth.job_sections import MOST_SAMPLES, TuningSection
from fedepth.layout import Encoding
from fedepth.models.catalog import named_spec
from fedepth.plan import MOST_MODELS, Ending, Plan, Policy
from fedepth.planning.explain import Alternative, Explanation, explain
from fedepth.printable import as_typed, printable
from fedepth.sizes import format_size, parse_size
from fedepth.task import MOST_BATCH, MOST_CLASSES, MOST_EPOCHS, ModelSpec, Optimizer, TrainingSpec
from fedepth.terminal import console, print_json

_ENDINGS = {
    Ending.LAST_UNIT: "the last units are trained",
    Ending.FROZEN_SUFFIX: "the last units are untrained, the head is trained",
    Ending.FROZEN_HEAD: "the last units and the head are untrained",
}


@dataclass(frozen=True)
class Asked:
    """What a plan is asked for.

    Attributes:
        folder: where the module of a custom model may lie, besides where Python looks; empty for nowhere.
        tuning: what of the model is trained.
    """

    name: str
    model: ModelSpec
    training: TrainingSpec
    policy: Policy
    folder: str = ""
    tuning: TuningSection = field(default_factory=TuningSection)


# A model alone is planned with these; a job file says them itself.
_DEFAULTS = {"batch": 128, "local_epochs": 1, "optimizer": "sgd", "momentum": 0.9, "mutual": 1}


def plan_command(
    model: Annotated[
        str, typer.Argument(help="A job file (.toml), or a zoo model, torchvision:NAME, timm:NAME, or module:function.")
    ],
    budget: Annotated[str, typer.Option(help="Memory that training may use, such as 300MiB.")],
    policy: Annotated[
        Policy | None,
        typer.Option(
            help="paper: the whole batch at once; auto: also micro-batches. auto for a model.", show_default=False
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=MOST_BATCH, help="Samples per optimizer step; 128 for a model.")
    ] = None,
    optimizer: Annotated[
        Optimizer | None, typer.Option(help="Sets how much state a weight has; sgd for a model.")
    ] = None,
    momentum: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="For sgd; 0 keeps no state. 0.9 for a model.")
    ] = None,
    input_shape: Annotated[
        str | None, typer.Option("--input", help="CxHxW, such as 3x32x32; zoo models have a default.")
    ] = None,
    classes: Annotated[
        int | None, typer.Option(min=1, max=MOST_CLASSES, help="Number of classes; 10 for a model.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, max=MOST_SAMPLES, help="Samples on the device; determines the cache size.")
    ] = 1024,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=MOST_EPOCHS, help="Passes over the samples in a round; 1 for a model.")
    ] = None,
    mutual: Annotated[
        int | None, typer.Option(min=1, max=MOST_MODELS, help="Maximum number of models that distil from each other.")
    ] = None,
    round_number: Annotated[
        int, typer.Option("--round", min=1, help="Of the job: BatchNorm may have fixed statistics in later ones.")
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

    With a job file, its settings apply unless an option here overrides them, which shows for example what another batch
    size would change.
    The memory that kernels and the allocator take is estimated for a desktop with tcmalloc unless --calibration is
    given; a device in a job uses its own calibration.
    """
    device = _calibration(calibration) if calibration else Calibration()
    budget_bytes = parse_size(budget)
    save_timeline = picture_maker(plot, _load_timeline) if plot else None
    given = {
        "batch": batch, "local_epochs": epochs, "optimizer": None if optimizer is None else optimizer.value,
        "momentum": momentum, "mutual": mutual,
    }  # fmt: skip
    changes = {name: value for name, value in given.items() if value is not None}
    if model.endswith(".toml"):
        if input_shape is not None or classes is not None:
            raise ConfigError(f"--input and --classes are for a model; {model} says both in its section [model]")
        asked = _of_job(Path(model), round_number, changes, policy)
    elif round_number != 1:
        raise ConfigError(f"--round is for a job file; {model} is a model")
    else:
        asked = _of_model(model, input_shape, classes, changes, policy)
    training = asked.training
    title = (
        f"{asked.name}, batch {training.batch}, {training.optimizer}, policy {asked.policy.value}, "
        f"budget {format_size(budget_bytes)}"
    )
    if training.encoding is not Encoding.FLOAT32:
        title += f", updates as {training.encoding.value}"
    with console(stderr=True).status(f"Tracing {asked.name}") as status:  # shows nothing where stderr is no terminal
        costs = replace(_trace(asked), calibration=device)
        status.update("Comparing plans")
        try:
            found = explain(
                costs, budget_bytes=budget_bytes, training=training, sample_count=samples, policy=asked.policy
            )
        except PlanError as error:
            raise PlanError(
                f"--budget {format_size(budget_bytes)} is too small for {asked.name} at batch {training.batch}, policy "
                f"{asked.policy.value}: the smallest plan needs {format_size(error.needed_bytes, round_up=True)}. "
                "Raise --budget to that, or lower --batch.",
                needed_bytes=error.needed_bytes,
                budget_bytes=budget_bytes,
            ) from None
        moments = timeline(costs, training, samples, found.plan)
        if plot and save_timeline:
            save_timeline(plot, moments, found.plan, title)
    if as_json:
        print_json(_fields(asked.name, samples, training, found, moments))
    else:
        out = console()
        out.print(_stages(found.plan, title))
        out.print(_coarser(found, budget_bytes, effective_batch(costs, training, samples)))
        for line in _neighbours(found, budget_bytes):
            out.print(line, markup=False, soft_wrap=True)
        if plot:
            out.print(f"Memory over time: {printable(str(plot))}", markup=False, soft_wrap=True)


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


def _of_model(
    model: str, input_shape: str | None, classes: int | None, changes: dict[str, Any], policy: Policy | None
) -> Asked:
    spec = named_spec(model, input_shape, 10 if classes is None else classes)
    settings = {"learning_rate": 0.1, "weight_decay": 0.0, "proximal_mu": 0.0, "augmentation": "none", "seed": 0}
    return Asked(model, spec, TrainingSpec(**{**settings, **_DEFAULTS, **changes}), policy or Policy.AUTO)


def _of_job(path: Path, round_number: int, changes: dict[str, Any], policy: Policy | None) -> Asked:
    config = jobs.load_config(path)
    if round_number > config.job.rounds:
        raise ConfigError(f"--round {round_number}: {path} has {config.job.rounds} rounds")
    training = replace(jobs.training_spec(config, round_number), **changes)
    chosen = policy or jobs.policy(config)
    return Asked(config.model.name, jobs.model_spec(config), training, chosen, config.folder, config.tuning)


def _trace(asked: Asked) -> ModelCosts:
    if not has_working_directory():  # torch's libraries would end this process
        raise ConfigError(NO_WORKING_DIRECTORY)
    try:
        from fedepth.prepare import trace_model
    except ImportError as error:
        raise ConfigError(f"{error}. Tracing a model needs torch: pip install 'fedepth[train]'") from error

    folder = Path(asked.folder) if asked.folder else None
    prepared = trace_model(asked.model, asked.training, seed=0, folder=folder, tuning=asked.tuning)
    return prepared.traced.in_training(asked.training).costs


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
