"""The server process: opens the state, binds the port, runs the job, and ends in order.

It imports neither torch nor onnx: what needs a model is done by the model worker.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog
from fedepth_wire.channel import SERVER_OPTIONS
from fedepth_wire.v1 import federation_pb2
from fedepth_wire.v1.federation_pb2_grpc import add_FederationServicer_to_server
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from coordinator.global_model import prepare
from coordinator.job import Job
from coordinator.listening import listen
from coordinator.model_worker.client import Models
from coordinator.service import FederationService
from coordinator.store.records import Store
from fedepth.address import DEFAULT_PORT, Address
from fedepth.files import disk_errors, write_atomically
from fedepth.job import model_spec
from fedepth.job_sections import JobConfig
from fedepth.program import stop_on_signals

GRACE_S = 2.0
FAREWELL_S = 10.0

_SERVICE = federation_pb2.DESCRIPTOR.services_by_name["Federation"].full_name
_log = structlog.get_logger()


@dataclass(frozen=True)
class ServeOptions:
    """Where and how to serve. Port 0 lets the system choose one; `port_file` then tells which.

    `database` and `files` are those of `Store.open`.
    """

    state: Path
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    port_file: Path | None = None
    exit_when_done: bool = False
    database: str = ""
    files: str = ""


async def serve(config: JobConfig, options: ServeOptions, models: Models) -> None:
    """Runs a job's coordinator until SIGINT or SIGTERM, or until the job is done if that was asked for.

    Raises:
        ConfigError: the host is not an address.
        TransportError: the port cannot be bound.
        StateError: the state directory is in use, damaged, or another job's.
        FedepthError: the model cannot be built, or a round cannot be averaged.
    """
    store = Store.open(
        options.state, config.job.name, model_spec(config), database=options.database, files=options.files
    )
    stop = asyncio.Event()
    stop_on_signals(stop.set)
    try:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        address = listen(server, options.host, options.port)
        job = await _prepared_job(config, store, models, stop)
        if job is not None:
            await _serve_job(job, server, address, options, stop)
    finally:
        await models.stop()
        # What was going on in a thread when the job was told to end must be over before another may have the state.
        await asyncio.get_running_loop().shutdown_default_executor()
        store.close()


async def _prepared_job(config: JobConfig, store: Store, models: Models, stop: asyncio.Event) -> Job | None:
    """None if a signal came while the model was being prepared."""
    preparing = asyncio.ensure_future(prepare(config, store, models))
    if not await _first(preparing, stop):
        return None
    return Job(config, store, models, preparing.result())


async def _serve_job(
    job: Job, server: grpc.aio.Server, address: Address, options: ServeOptions, stop: asyncio.Event
) -> None:
    health = HealthServicer()
    add_FederationServicer_to_server(FederationService(job), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection(
        (_SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME),
        server,
    )
    await server.start()
    for name in ("", _SERVICE):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    if options.port_file is not None:
        with disk_errors("the port cannot be written to --port-file", options.port_file.parent):
            write_atomically(options.port_file, f"{address.port}\n".encode())
    _log.info("serving", address=str(address), job=job.config.job.name, state=str(options.state))
    running = asyncio.ensure_future(_run(job, options.exit_when_done))
    try:
        await _first(running, stop)
    finally:
        await health.enter_graceful_shutdown()
        job.events.close()
        await server.stop(GRACE_S)
        job.plans.close()
        _log.info("stopped", address=str(address), round=job.state.round, phase=job.state.phase.value)


async def _run(job: Job, exit_when_done: bool) -> None:
    """Ends when the job is done and every live device knows; without `exit_when_done` only by an error."""
    if not exit_when_done:
        await job.run()
    elif not await _first(asyncio.ensure_future(job.run()), job.finished):
        await _farewell(job)


async def _farewell(job: Job) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + FAREWELL_S
    while job.unaware_devices() and loop.time() < end:
        await asyncio.sleep(0.05)


async def _first(work: asyncio.Future[Any], event: asyncio.Event) -> bool:
    """Waits for either. True if the work is done (raises its error); else the event came: it is cancelled."""
    waiter = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({work, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
            return True
        return False
    finally:
        waiter.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
