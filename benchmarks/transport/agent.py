"""The agent of a device, with the trainer of benchmarks.transport in the place of its own.

python -m benchmarks.transport.agent HOST:PORT DATA STATE NAME
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.modules["rich"] = None  # type: ignore[assignment]  # as edge_client.daemon does, and for its reason

import asyncio

from edge_client import config as settings
from edge_client.agent import Agent, Surroundings
from edge_client.certificate.client import device_identity
from edge_client.identity import StateLock, device_id
from edge_client.samples import Samples
from edge_client.transport import GrpcTransport
from fedepth.child import module_argv
from fedepth.costs import Calibration
from fedepth.heap import give_back_freed, share_one_arena
from fedepth.logs import configure_logs, renderer
from fedepth.program import run_program


def _serve() -> None:
    share_one_arena()
    give_back_freed(64 << 10)
    coordinator, data, state, name = sys.argv[1:]
    config = settings.load(
        None, {"coordinator": coordinator, "data": data, "state": state, "name": name, "trainer.linger_s": 300.0}
    )
    configure_logs(renderer(True))
    with StateLock(config.state_dir):
        asyncio.run(_run(config))


async def _run(config: settings.Config) -> None:
    state = config.state_dir
    agent = Agent(
        config,
        device_id(state),
        GrpcTransport(config.coordinator, state, device_identity(state)),
        Calibration(),
        samples=Samples(config),
        surroundings=Surroundings(trainer_argv=module_argv("benchmarks.transport.trainer")),
    )
    await agent.run()


if __name__ == "__main__":
    run_program("fedepth-client", _serve)
