"""The agent's process: `fedepth-client run` turns into it once it has read its command line.

It loads no library for command lines: with typer and what typer brings, an idle agent is 10 MiB larger.
"""

from __future__ import annotations

import asyncio
import ctypes
import platform
import signal
import sys

import msgspec
import structlog
from msgspec.structs import replace

from edge_client.agent import Agent, Surroundings
from edge_client.config import Config
from edge_client.identity import StateLock, device_id
from edge_client.measure.calibration import calibrated
from edge_client.samples import Samples
from edge_client.transport import GrpcTransport
from fedepth.costs import Calibration
from fedepth.errors import ChildError, FedepthError, ModelError, PlanError, StateError
from fedepth.logs import configure_logs

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_KEEP_BYTES = 64 << 10


class Start(msgspec.Struct, frozen=True):
    """What the command line has decided."""

    config: Config
    exit_when_done: bool
    json_logs: bool


def main() -> None:
    """Runs the agent that the first argument, a `Start` as JSON, describes."""
    stay_small()
    start = msgspec.json.decode(sys.argv[1], type=Start)
    try:
        with StateLock(start.config.state_dir):
            asyncio.run(_run(start.config, start.exit_when_done, _surroundings(start.json_logs)))
    except FedepthError as error:
        print(f"fedepth-client: {error}", file=sys.stderr)
        sys.exit(1)


def stay_small() -> None:
    """Makes glibc give back what was freed, and share one arena among gRPC's threads.

    By itself glibc raises its thresholds to the size of the largest buffer that was ever freed, 1 MiB after the first
    transfer, and then keeps such buffers. Other C libraries have no such setting and need none.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    for setting, value in (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_THRESHOLD, _KEEP_BYTES),
        (_M_TRIM_THRESHOLD, _KEEP_BYTES),
    ):
        library.mallopt(setting, value)


def _surroundings(json_logs: bool) -> Surroundings:
    if json_logs or not sys.stderr.isatty():
        plain = structlog.dev.ConsoleRenderer(colors=False)
        configure_logs(structlog.processors.JSONRenderer() if json_logs else plain)
        return Surroundings()
    from edge_client.display import Bar  # loads rich, which only a terminal needs

    bar = Bar()
    configure_logs(structlog.dev.ConsoleRenderer(colors=True), bar.write_line)
    return Surroundings(on_progress=bar.show)


async def _run(config: Config, exit_when_done: bool, surroundings: Surroundings) -> None:
    transport = GrpcTransport(config.coordinator, config.state_dir)
    identity = device_id(config.state_dir)

    async def work() -> None:
        samples = Samples(config)
        await samples.look()  # where there is nothing to train on, nothing need be measured either
        calibration, settled = Calibration(), config
        try:
            calibration = (await calibrated(config.trainer, _log_step, memory=config.memory)).calibration
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

    task = asyncio.ensure_future(work())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        structlog.get_logger().info("stopped; what was trained is kept and delivered at the next start")


def _log_step(what: str) -> None:
    structlog.get_logger().info("measuring once what training takes on this device", step=what)


if __name__ == "__main__":
    main()
