"""`fedepth-client`: run the agent of this device, or look at its memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from fedepth_wire.tokens import parse_token
from msgspec.structs import replace
from rich.table import Table

from edge_client import config as settings
from edge_client.certificate.client import bundle_of, day
from edge_client.daemon import Start
from edge_client.measure.calibration import Calibrated, cache_dir, calibrated
from edge_client.measure.capability import (
    Capability,
    CapabilityRequest,
    busy_share,
    default_samples,
    measure_capability,
)
from edge_client.measure.capability_tables import tables
from edge_client.measure.trial import MOST_SAMPLES
from edge_client.memory.budget import Budgets
from edge_client.memory.probe import Memory, measure
from edge_client.trainer.client import torch_version
from fedepth.address import ENROLL_PORT, parse_address
from fedepth.budget import Budget
from fedepth.child import module_argv
from fedepth.commands import JsonLogsOption, JsonOption, command_line, examples, picture_maker
from fedepth.errors import ConfigError, StateError
from fedepth.logs import configure_logs, renderer
from fedepth.models.catalog import named_spec
from fedepth.plan import Policy
from fedepth.printable import printable
from fedepth.program import hand_over, run_program
from fedepth.sizes import format_size, parse_size
from fedepth.task import MOST_BATCH, MOST_CLASSES, Optimizer, TrainingSpec
from fedepth.terminal import console, print_json

app = command_line("fedepth-client", "Train on this device's data within its free memory.")

_ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with the settings.")]
_State = Annotated[Path | None, typer.Option(help="Folder for the device's identity and undelivered updates.")]
_Threads = Annotated[int | None, typer.Option(help="Number of torch threads; 0 lets torch choose.")]
_Cap = Annotated[str | None, typer.Option(help="Upper limit on training memory, such as 300MiB.")]


@app.command(epilog=examples("fedepth-client run --coordinator 192.168.1.10:8970 --data ./photos --budget-cap 300MiB"))
def run(
    coordinator: Annotated[str | None, typer.Option(help="HOST:PORT of the coordinator.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder or file with the training data.")] = None,
    config: _ConfigFile = None,
    state: _State = None,
    name: Annotated[str | None, typer.Option(help="Human-readable name of the device.")] = None,
    budget_cap: _Cap = None,
    linger: Annotated[float | None, typer.Option(help="Seconds to keep an idle trainer running.")] = None,
    threads: _Threads = None,
    exit_when_done: Annotated[bool, typer.Option("--exit-when-done", help="Exit when the job is finished.")] = False,
    json_logs: JsonLogsOption = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plain text, without certificates: for tests on one machine.")
    ] = False,
) -> None:
    """Take part in a job: wait for tasks, train, and deliver updates. Runs until stopped."""
    overrides = {
        "insecure": insecure or None,
        "coordinator": coordinator,
        "data": str(data) if data else None,
        "state": str(state) if state else None,
        "name": name,
        "memory.cap": budget_cap,
        "trainer.linger_s": linger,
        "trainer.threads": threads,
    }
    chosen = settings.load(config, _given(overrides))
    settings.check_runnable(chosen)
    started = Start(chosen, exit_when_done=exit_when_done, json_logs=json_logs)
    # This process has loaded the command line's libraries, which an idle agent must not keep for months. The agent
    # takes its place: same process id, same streams.
    argv = [*module_argv("edge_client.daemon"), msgspec.json.encode(started).decode()]
    hand_over(argv)


@app.command(
    epilog=examples(
        "fedepth-client enroll 192.168.1.10:8971 --token TOKEN",
        "fedepth-client enroll --bundle kitchen.pem",
    )
)
def enroll(
    address: Annotated[
        str | None,
        typer.Argument(metavar="HOST:PORT", show_default=False, help="Where the coordinator enrols devices."),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="FEDEPTH_TOKEN", show_default=False, help="What fedepth-coordinator enroll printed for this device."
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            show_default=False, help="What fedepth-coordinator certs issue made, instead of address and token."
        ),
    ] = None,
    config: _ConfigFile = None,
    state: _State = None,
    as_json: JsonOption = False,
) -> None:
    """Get this device's certificate, once. A running agent takes it over.

    With a token, this device makes its own key, which never leaves it.
    """
    from edge_client.enroll import enroll_with_bundle, enroll_with_token

    chosen = settings.load(config, _given({"state": str(state) if state else None}))
    if bundle is not None and not address and not token:
        facts = enroll_with_bundle(bundle, chosen.state_dir)
    elif address and token and bundle is None:
        facts = enroll_with_token(parse_address(address, ENROLL_PORT), parse_token(token), chosen.state_dir)
    else:
        raise ConfigError(
            "give HOST:PORT and --token TOKEN, as fedepth-coordinator enroll prints them, or --bundle FILE"
        )
    path = bundle_of(chosen.state_dir)
    if as_json:
        print_json({"name": facts.name, "id": facts.uri, "not_after": int(facts.not_after), "bundle": str(path)})
        return
    print(f"this device is {printable(facts.name)} until {day(facts.not_after)}, and renews its certificate before")
    if bundle is not None:
        print(f"delete {printable(str(bundle))} now: whoever can read it can be this device")


@app.command(epilog=examples("fedepth-client probe --json"))
def probe(
    config: _ConfigFile = None,
    state: _State = None,
    budget_cap: _Cap = None,
    as_json: JsonOption = False,
) -> None:
    """Show how much memory is free, what limits it, and how much training may use."""
    overrides = {"state": str(state) if state else None, "memory.cap": budget_cap}
    chosen = settings.load(config, _given(overrides))
    memory = measure()
    budget = _known_budget(chosen, memory)
    if as_json:
        fields = msgspec.to_builtins(memory) | {"available_bytes": memory.available_bytes}
        print_json(fields | {"budget": budget})
    else:
        console().print(_table(memory, budget))


@app.command(epilog=examples("fedepth-client calibrate --json"))
def calibrate(
    config: _ConfigFile = None,
    threads: _Threads = None,
    as_json: JsonOption = False,
) -> None:
    """Measure which allocator suits this device and what its backend takes outside the tensors, even if already known.

    An agent does this automatically when it first starts and when torch or the allocator has changed.
    """
    chosen = settings.load(config, _given({"trainer.threads": threads}))
    _log_warnings_only()
    with console(stderr=True).status("starting") as status:
        folder = cache_dir(chosen.state)
        measuring = calibrated(chosen.trainer, status.update, memory=chosen.memory, again=True, folder=folder)
        found = asyncio.run(measuring)
    if as_json:
        print_json(found)
    else:
        for table in _calibration_tables(found):
            console().print(table)


@app.command(epilog=examples("fedepth-client report preresnet20 --batch 32 --plot report.png"))
def report(
    model: Annotated[str, typer.Argument(help="A model of the zoo, torchvision:NAME, timm:NAME, or module:function.")],
    batch: Annotated[int, typer.Option(min=1, max=MOST_BATCH, help="Samples per optimizer step.")] = 128,
    optimizer: Annotated[Optimizer, typer.Option(help="Sets how much state a weight has.")] = Optimizer.SGD,
    policy: Annotated[Policy, typer.Option(help="paper: the whole batch at once; auto: also micro-batches.")] = (
        Policy.AUTO
    ),
    input_shape: Annotated[
        str | None, typer.Option("--input", help="CxHxW, such as 3x32x32; zoo models have a default.")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, max=MOST_CLASSES, help="Number of classes.")] = 10,
    samples: Annotated[
        int | None, typer.Option(min=2, max=MOST_SAMPLES, help="Samples to train on; enough for a few steps.")
    ] = None,
    budget: Annotated[list[str] | None, typer.Option(help="A budget to try, as 300MiB; may be repeated.")] = None,
    budget_cap: _Cap = None,
    config: _ConfigFile = None,
    state: _State = None,
    threads: _Threads = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write: .png, .pdf or .svg.", dir_okay=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what this device can train: each unit alone, and the best plan for each of several budgets.

    Trains on noise images under the limits that a job would have. Takes a minute for a small model on a desktop.
    """
    overrides = {
        "state": str(state) if state else None,
        "memory.cap": budget_cap,
        "trainer.threads": threads,
    }
    chosen = settings.load(config, _given(overrides))
    save_capability = picture_maker(plot, _load_capability) if plot else None
    wanted = CapabilityRequest(
        model=named_spec(model, input_shape, classes),
        training=TrainingSpec(batch, 1, optimizer.value, 1e-3, 0.9, 5e-4, 0.0, "none", 1),
        policy=policy,
        sample_count=samples or default_samples(batch),
        budgets=tuple(parse_size(text) for text in budget or ()),
    )
    _log_warnings_only()
    with console(stderr=True).status("starting") as status:  # shows nothing where stderr is no terminal
        found = asyncio.run(_report(wanted, chosen, status.update))
    if as_json:
        print_json(found)
    else:
        out = console()
        for table in tables(found):
            out.print(table)
    if plot and save_capability:
        save_capability(plot, found)
        if not as_json:
            print(f"Picture: {printable(str(plot))}")


def main() -> None:
    """Runs a command and ends; see `fedepth.program`."""
    run_program("fedepth-client", app)


def _given(overrides: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in overrides.items() if value is not None}


def _known_budget(config: settings.Config, memory: Memory) -> Budget | None:
    """The budget, if an agent has already measured what a trainer's start costs."""
    try:
        budgets = Budgets(config.state_dir, config.memory, torch_version(), lambda: memory)
    except (ConfigError, StateError):
        return None  # no torch, or no state directory: this device can be probed, but has not learnt anything
    return budgets.budget() if budgets.start_bytes is not None else None


async def _report(wanted: CapabilityRequest, config: settings.Config, on_progress: Callable[[str], None]) -> Capability:
    """With the device's own calibration and the allocator that suits it."""
    busy = busy_share()  # before we keep the device busy ourselves
    folder = cache_dir(config.state)
    calibration = (await calibrated(config.trainer, on_progress, memory=config.memory, folder=folder)).calibration
    settled = replace(config, trainer=replace(config.trainer, allocator=calibration.allocator))
    return await measure_capability(wanted, settled, calibration=calibration, busy=busy, on_progress=on_progress)


def _calibration_tables(found: Calibrated) -> tuple[Table, Table]:
    allocators = Table("allocator", "version", "peak", "s/step", "", title="Allocators")
    for trial in found.trials:
        chosen = "chosen" if trial.allocator == found.calibration.allocator else ""
        peak = format_size(trial.peak_bytes)
        allocators.add_row(trial.allocator, trial.name, peak, f"{trial.seconds_per_step:.3f}", chosen)
    calibration = found.calibration
    beside = Table(show_header=False, title="Memory that training takes outside its tensors")
    beside.add_row("for any block", format_size(calibration.fixed_bytes))
    beside.add_row("of the memory it may keep, the allocator keeps", f"{calibration.kept:.0%}")
    beside.add_row("share of a convolution's weights", f"{calibration.kernel_share:.0%}")
    beside.add_row("share of a depth-wise convolution's padded weights", f"{calibration.depthwise_share:.0%}")
    beside.add_row("share of weights, input, output if not channels_last", f"{calibration.reordered_share:.0%}")
    beside.add_row("median error of the predicted need", f"{found.median_error:.1%} over {found.stages} stages")
    return allocators, beside


def _load_capability() -> Callable[[Path, Capability], None]:
    from edge_client.measure.capability_plot import save_capability

    return save_capability


def _log_warnings_only() -> None:
    """To standard error: standard output belongs to what was asked for."""
    configure_logs(renderer(json_lines=False), level=logging.WARNING)


def _table(memory: Memory, budget: Budget | None) -> Table:
    table = Table(show_header=False, title="Memory of this device")
    table.add_row("total", format_size(memory.total_bytes))
    table.add_row("available", format_size(memory.available_bytes))
    for limit in memory.limits:
        bound = f" of {format_size(limit.limit_bytes)}" if limit.limit_bytes else ""
        table.add_row(f"  by {limit.origin}", format_size(limit.available_bytes) + bound)
    table.add_row("swap (not counted)", f"{format_size(memory.swap_free_bytes)} of {format_size(memory.swap_bytes)}")
    if memory.board:
        table.add_row("board", memory.board + (" (CPU and GPU share memory)" if memory.unified else ""))
    for name in memory.cuda:
        table.add_row("CUDA", name)
    if memory.pressure:
        ten, sixty = memory.pressure.some_10_s, memory.pressure.some_60_s
        table.add_row("waiting for memory", f"{ten:g} % of the last 10 s, {sixty:g} % of 60 s")
    for note in memory.notes:
        table.add_row("note", note)
    if budget is None:
        table.add_row("budget", "unknown until the agent has started a trainer once")
    else:
        table.add_row("trainer start", format_size(budget.start_bytes))
        table.add_row("budget", format_size(budget.budget_bytes))
    return table


if __name__ == "__main__":
    main()
