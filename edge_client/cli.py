"""`fedepth-client`: run the agent of this device, or look at its memory."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import structlog
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from edge_client import config as settings
from edge_client.agent import Agent, Surroundings
from edge_client.allowance import Allowance
from edge_client.identity import StateLock, device_id
from edge_client.probe import Memory, measure
from edge_client.trainer_process import torch_version
from edge_client.transport import GrpcTransport
from fedepth.errors import ConfigError, FedepthError
from fedepth.sizes import format_size
from fedepth.task import Budget
from fedepth.task import Progress as TaskProgress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The device's side of fedepth: trains on local data within the memory that is free.",
)

_ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with the settings.")]
_State = Annotated[Path | None, typer.Option(help="Where identity and kept updates live.")]
_Cap = Annotated[str | None, typer.Option(help="The most that training may add, as 300MiB.")]


@app.command(epilog="Example: fedepth-client run --coordinator 192.168.1.10:50051 --data ./photos --budget-cap 300MiB")
def run(
    coordinator: Annotated[str | None, typer.Option(help="HOST:PORT of the coordinator.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the training data.")] = None,
    config: _ConfigFile = None,
    state: _State = None,
    name: Annotated[str | None, typer.Option(help="The device's name for people.")] = None,
    budget_cap: _Cap = None,
    linger: Annotated[float | None, typer.Option(help="Seconds that an idle trainer stays.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch; 0: its choice.")] = None,
    allow_model: Annotated[list[str] | None, typer.Option(help="Allow a job to name module:function.")] = None,
    exit_when_done: Annotated[bool, typer.Option("--exit-when-done", help="End when the job is finished.")] = False,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="One JSON object per log line.")] = False,
) -> None:
    """Takes part in a job: waits for tasks, trains, delivers. Runs until it is stopped."""
    overrides = {
        "coordinator": coordinator,
        "data": str(data) if data else None,
        "state": str(state) if state else None,
        "name": name,
        "memory.cap": budget_cap,
        "trainer.linger_s": linger,
        "trainer.threads": threads,
        "models.allow": allow_model or None,
    }
    chosen = settings.load(config, _given(overrides))
    settings.check_runnable(chosen)
    bar = None if json_logs or not sys.stderr.isatty() else _Bar(Console(stderr=True))
    configure_logs(as_json=json_logs, console=bar.console if bar else None)
    with StateLock(chosen.state_dir):
        asyncio.run(_run(chosen, exit_when_done, Surroundings(on_progress=bar.show) if bar else Surroundings()))


@app.command(epilog="Example: fedepth-client probe --json")
def probe(
    config: _ConfigFile = None,
    state: _State = None,
    budget_cap: _Cap = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, sizes in bytes.")] = False,
) -> None:
    """Shows how much memory is free here, what bounds it, and what training may add."""
    overrides = {"state": str(state) if state else None, "memory.cap": budget_cap}
    chosen = settings.load(config, _given(overrides))
    memory = measure()
    budget = _known_budget(chosen, memory)
    if as_json:
        fields = msgspec.to_builtins(memory) | {"available_bytes": memory.available_bytes}
        print(msgspec.json.encode(fields | {"budget": budget}).decode())
    else:
        Console().print(_table(memory, budget))


def main() -> None:
    """The program. The one place where an error becomes an exit status."""
    try:
        app()
    except FedepthError as error:
        print(f"fedepth-client: {error}", file=sys.stderr)
        sys.exit(1)


def configure_logs(*, as_json: bool, console: Console | None) -> None:
    """Log lines on standard error, above the progress bar if there is one."""
    renderer: Any = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=console is not None)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=_BarLogger(console) if console else structlog.PrintLoggerFactory(sys.stderr),
    )


class _BarLogger:
    """Prints lines through the console that draws the bar, so that neither overwrites the other."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, *_: object) -> _BarLogger:
        return self

    def msg(self, line: str) -> None:
        self._console.print(Text.from_ansi(line), soft_wrap=True)

    debug = info = warning = error = critical = msg


async def _run(config: settings.Config, exit_when_done: bool, surroundings: Surroundings) -> None:
    transport = GrpcTransport(config.coordinator, config.state_dir)
    identity = device_id(config.state_dir)
    agent = Agent(config, identity, transport, exit_when_done=exit_when_done, surroundings=surroundings)
    task = asyncio.ensure_future(agent.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        structlog.get_logger().info("stopped; what was trained is kept and delivered at the next start")


class _Bar:
    """Where the task is, on a terminal."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        self._progress = Progress(*columns, console=console, transient=True)
        self._line: TaskID | None = None

    @property
    def console(self) -> Console:
        return self._progress.console

    def show(self, now: TaskProgress | None) -> None:
        """Draws `now`; None takes the bar away."""
        if now is None:
            if self._line is not None:
                self._progress.remove_task(self._line)
                self._progress.stop()
                self._line = None
            return
        if self._line is None:
            self._progress.start()
            self._line = self._progress.add_task("", note="")
        trains = now.stage_count > 0
        name = f"{now.activity}: stage {now.stage + 1}/{now.stage_count}" if trains else now.activity
        note = f"epoch {now.epoch}/{now.epochs}, loss {now.loss:.4f}" if now.epochs else ""
        total = float(now.stage_count * max(1, now.epochs)) if trains else None
        done = now.stage * max(1, now.epochs) + now.epoch
        self._progress.update(self._line, description=name, total=total, completed=done, note=note)


def _given(overrides: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in overrides.items() if value is not None}


def _known_budget(config: settings.Config, memory: Memory) -> Budget | None:
    """The budget, if an agent has already measured what a trainer's start costs."""
    try:
        allowance = Allowance(config.state_dir, config.memory, torch_version(), lambda: memory)
    except ConfigError:
        return None  # no torch: this device can be probed, but not train
    return allowance.budget() if allowance.start_bytes is not None else None


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
