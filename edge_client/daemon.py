"""The agent's process: `fedepth-client run` turns into it once it has read its command line.

It loads no library for command lines: with typer and what typer brings, an idle agent is 10 MiB larger.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # structlog loads rich if it finds it, for traces in colour, which an agent never shows. That is 4.5 MiB for months.
    sys.modules["rich"] = None  # type: ignore[assignment]

import asyncio
import contextlib
from pathlib import Path

import msgspec
import structlog
from fedepth_wire.tls import INSECURE
from msgspec.structs import replace

from edge_client.agent import Agent, Surroundings
from edge_client.certificate.client import CertificateKeeper, device_identity
from edge_client.config import Config
from edge_client.identity import StateLock, device_id
from edge_client.measure.calibration import cache_dir, calibrated
from edge_client.samples import Samples
from edge_client.transport import GrpcTransport
from fedepth.costs import Calibration
from fedepth.errors import ChildError, ConfigError, ModelError, PlanError, StateError
from fedepth.files import NOT_JSON
from fedepth.heap import give_back_freed, share_one_arena
from fedepth.logs import configure_logs, renderer
from fedepth.printable import printable
from fedepth.program import run_program, stop_on_signals

_KEEP_BYTES = 64 << 10  # of freed memory


class Start(msgspec.Struct, frozen=True):
    """What the command line has decided."""

    config: Config
    exit_when_done: bool
    json_logs: bool


def main() -> None:
    """Runs the agent that the first argument, a `Start` as JSON, describes."""
    run_program("fedepth-client", _serve, _bugs_folder)


def _start() -> Start:
    """What the command line has decided.

    Raises:
        ConfigError: this process was not started by the command line.
    """
    try:
        (text,) = sys.argv[1:]
        return msgspec.json.decode(text, type=Start)
    except (ValueError, *NOT_JSON) as error:
        raise ConfigError(
            f"the agent's process was not given what fedepth-client run gives it ({printable(str(error))}); start it "
            "with fedepth-client run"
        ) from None


def _bugs_folder() -> Path | None:
    with contextlib.suppress(ConfigError):
        state = _start().config.state
        return Path(state) if state else None
    return None


def _serve() -> None:
    share_one_arena()
    give_back_freed(_KEEP_BYTES)
    start = _start()
    state = start.config.state_dir
    with StateLock(state):
        asyncio.run(_run(start.config, state, start.exit_when_done, _surroundings(start.json_logs)))


def _surroundings(json_logs: bool) -> Surroundings:
    if json_logs or sys.stderr is None or not sys.stderr.isatty():
        configure_logs(renderer(json_logs))
        return Surroundings()
    sys.modules.pop("rich", None)
    from edge_client.display import Bar  # loads rich, which only a terminal needs

    bar = Bar()
    configure_logs(renderer(json_logs), bar.write_line)
    return Surroundings(on_progress=bar.show)


async def _run(config: Config, state: Path, exit_when_done: bool, surroundings: Surroundings) -> None:
    credentials = INSECURE if config.insecure else device_identity(state)
    transport = GrpcTransport(config.coordinator, state, credentials)
    identity = device_id(state)
    keeper = None if config.insecure else CertificateKeeper(state, identity, transport, remind_s=config.retry.remind_s)
    if keeper is None:
        structlog.get_logger().warning("plain text: whoever is on the way can read and forge", to=config.coordinator)

    async def work() -> None:
        samples = Samples(config)
        await samples.look()  # where there is nothing to train on, nothing need be measured either
        calibration, settled = Calibration(), config
        try:
            folder = cache_dir(config.state)
            found = await calibrated(config.trainer, _log_step, memory=config.memory, folder=folder)
            calibration = found.calibration
            settled = replace(config, trainer=replace(config.trainer, allocator=calibration.allocator))
        except (PlanError, ChildError, ModelError, StateError) as error:
            # Tasks may still come out well, and if not, say so. Nothing is recorded, so the next start measures.
            structlog.get_logger().warning("calibration failed; planning with default figures", error=str(error))
        agent = Agent(
            settled,
            identity,
            transport,
            calibration,
            exit_when_done=exit_when_done,
            samples=samples,
            surroundings=surroundings,
        )
        await agent.run()

    async def kept_up() -> None:
        if keeper is None:
            await work()
            return
        working, keeping = asyncio.ensure_future(work()), asyncio.ensure_future(keeper.run())
        try:
            done, _ = await asyncio.wait({working, keeping}, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
        finally:
            for each in (working, keeping):
                each.cancel()
            await asyncio.wait({working, keeping})

    task = asyncio.ensure_future(kept_up())
    stopping = asyncio.Event()

    def stop() -> None:
        stopping.set()
        task.cancel()

    stop_on_signals(stop)
    try:
        await task
    except asyncio.CancelledError as error:
        if not stopping.is_set():  # status 0 would say that nobody need start it again
            raise RuntimeError("the agent's work was cancelled, and no signal had asked for it") from error
        structlog.get_logger().info("stopped; what was trained is kept and delivered at the next start")


def _log_step(what: str) -> None:
    structlog.get_logger().info("measuring once what training takes on this device", step=what)


if __name__ == "__main__":
    main()
