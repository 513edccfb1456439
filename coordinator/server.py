"""The server process: opens the state, binds the port, runs the job, and ends in order.

It imports neither torch nor onnx: what needs a model is done by the model worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import structlog
from fedepth_wire.channel import SERVER_OPTIONS
from fedepth_wire.tls import Insecure
from fedepth_wire.v1 import federation_pb2
from fedepth_wire.v1.federation_pb2_grpc import add_FederationServicer_to_server
from fedepth_wire.v1.trust_pb2_grpc import add_CertificatesServicer_to_server
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from coordinator.global_model import prepare
from coordinator.job import Job
from coordinator.listening import NoServer, Server, listen
from coordinator.model_worker.client import Models
from coordinator.security.certificates import Certificates
from coordinator.security.enrolling import CertificatesService
from coordinator.security.serving import Secured
from coordinator.service import FederationService
from coordinator.start_checks import Examine, Findings, disk_findings, nothing_to_find, together, writable
from coordinator.store.records import Store
from fedepth.address import DEFAULT_PORT, Address
from fedepth.errors import ConfigError, FedepthError, StartError, StateError
from fedepth.files import disk_errors, write_atomically
from fedepth.job import model_spec
from fedepth.job_changes import refusal, settings_of
from fedepth.job_sections import JobConfig
from fedepth.program import stop_on_signals

GRACE_S = 2.0
FAREWELL_S = 10.0
THREADS = 32  # for files and buckets: one that hangs must not hold up those that work

_SERVICE = federation_pb2.DESCRIPTOR.services_by_name["Federation"].full_name
_log = structlog.get_logger()


@dataclass(frozen=True)
class ServeOptions:
    """Where and how to serve. Port 0 lets the system choose one; `port_file` then tells which.

    `database` and `files` are those of `Store.open`; `accept_changes` that of `fedepth.job_changes`.

    Attributes:
        certificates: of the coordinator and of everybody who may call; INSECURE: plain text, and no questions asked.
        enroll_port: where devices without a certificate get one; None: nowhere.
    """

    state: Path
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    port_file: Path | None = None
    exit_when_done: bool = False
    database: str = ""
    files: str = ""
    accept_changes: bool = False
    certificates: Certificates | Insecure = field(kw_only=True)
    enroll_port: int | None = None


@dataclass(frozen=True)
class _Listening:
    """Where a coordinator listens, and where it enrols devices."""

    address: Address
    enrollment: Address | None = None


async def serve(
    config: JobConfig,
    options: ServeOptions,
    models: Models,
    examine: Examine = nothing_to_find,
    missing: Sequence[FedepthError] = (),
) -> None:
    """Runs a job's coordinator until SIGINT or SIGTERM, or until the job is done if that was asked for.

    Args:
        examine: looks at what the job names, before anything is prepared.
        missing: what the job names and is not there: it is not served then, but all that is wrong is told.

    Raises:
        StartError: several things are wrong, or one that has no error of its own.
        ConfigError: the host is not an address.
        TransportError: the port cannot be bound.
        StateError: the state directory is in use or damaged, or its job is not this one.
        FedepthError: the model cannot be built, or a round cannot be averaged.
    """
    stop = asyncio.Event()
    stop_on_signals(stop.set)
    examining = asyncio.ensure_future(examine(config))
    if not await _first(examining, stop):
        return
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="files"))
    secured = None if isinstance(options.certificates, Insecure) else Secured(options.certificates)
    interceptors = [secured.guard] if secured else []
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=interceptors)
    # In threads, also before there is anybody to serve: a signal has to be heard.
    store, listening = await asyncio.to_thread(_opened, config, options, server, examining.result(), missing, secured)
    try:
        if stop.is_set():
            return
        job = await _prepared_job(config, store, models, stop)
        if job is not None:
            await _serve_job(job, server, listening, options, stop, secured)
    finally:
        await models.stop()
        # What was going on in a thread when the job was told to end must be over before another may have the state.
        await loop.shutdown_default_executor()
        store.close()


def _opened(
    config: JobConfig,
    options: ServeOptions,
    server: Server,
    found: Findings,
    missing: Sequence[FedepthError] = (),
    secured: Secured | None = None,
) -> tuple[Store, _Listening]:
    """The job's state, with what its file changes taken over, and where it listens.

    Raises:
        FedepthError: one thing is wrong; StartError: several. All that can be known by now is in it, with what was
            `found`.
    """
    found.tell()
    errors: list[FedepthError] = [*missing, *map(StartError, found.problems)]
    listening, wrong = _listen(options, server, secured)
    errors += wrong
    try:
        settings = settings_of(config)
        store = Store.open(
            options.state,
            config.job.name,
            model_spec(config),
            database=options.database,
            files=options.files,
            settings=settings,
        )
    except FedepthError as error:
        raise together([*errors, error]) from None
    try:
        changed = store.changed(settings)
        # Before the first task there are no rounds that were trained in another way.
        refused = refusal(changed, str(store.directory), options.accept_changes or not _has_begun(store))
        if refused:
            errors.append(StateError(refused))
        disk = _disk(config, store)
        disk.tell()
        errors += map(StartError, disk.problems)
        if errors:
            raise together(errors)
        first = store.take_over(model_spec(config), settings, changed)
    except BaseException:
        store.close()
        raise
    for change in changed:
        _log.info("setting changed", change=str(change), from_round=first)
    assert listening is not None
    return store, listening


def _listen(
    options: ServeOptions, server: Server, secured: Secured | None = None
) -> tuple[_Listening | None, list[FedepthError]]:
    errors: list[FedepthError] = []
    if options.port_file is not None:
        errors += map(StartError, writable("--port-file", options.port_file))
    credentials = for_enrollment = None
    if secured is not None:
        try:
            credentials, for_enrollment = secured.open()
        except FedepthError as error:
            errors.append(error)
    try:
        address = listen(server, options.host, options.port, credentials)
        if secured is None or for_enrollment is None or options.enroll_port is None:
            return _Listening(address), errors
        port = options.enroll_port
        enrollment = listen(secured.enrollment, options.host, port, for_enrollment, "--enroll-port")
    except FedepthError as error:
        return None, [*errors, error]
    return _Listening(address, enrollment), errors


def refused(error: ConfigError, options: ServeOptions) -> FedepthError:
    """What keeps a job from being served whose file cannot be used: that, and what can be known without it."""
    return together([error, *_listen(options, NoServer())[1]])


def _disk(config: JobConfig, store: Store) -> Findings:
    latest = store.latest_round()
    weights = 0 if latest is None else latest.size_bytes
    return disk_findings(config, store.files.free_bytes(), weights, store.directory, _has_begun(store))


def _has_begun(store: Store) -> bool:
    """Whether a task of the job has been handed out."""
    latest = store.latest_round()
    return latest is not None and (latest.round > 0 or bool(store.tasks_of(1)))


async def _prepared_job(config: JobConfig, store: Store, models: Models, stop: asyncio.Event) -> Job | None:
    """None if a signal came while the model was being prepared."""
    preparing = asyncio.ensure_future(prepare(config, store, models))
    if not await _first(preparing, stop):
        return None
    disk = await asyncio.to_thread(_disk, config, store)  # again, now that the size of the model is known
    disk.tell()
    if disk.problems:
        raise StartError(disk.problems[0])
    return await asyncio.to_thread(Job, config, store, models, preparing.result())


async def _serve_job(
    job: Job,
    server: grpc.aio.Server,
    listening: _Listening,
    options: ServeOptions,
    stop: asyncio.Event,
    secured: Secured | None,
) -> None:
    health = HealthServicer()
    add_FederationServicer_to_server(FederationService(job), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection(
        (_SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME),
        server,
    )
    if secured is not None:
        await _secure(job, server, listening, secured)
    await server.start()
    for name in ("", _SERVICE):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    if options.port_file is not None:
        await asyncio.to_thread(_write_port, options.port_file, listening.address.port)
    enrollment = {} if listening.enrollment is None else {"enrollment": str(listening.enrollment)}
    address = str(listening.address)
    _log.info("serving", address=address, job=job.config.job.name, state=str(options.state), **enrollment)
    if secured is None:
        _log.warning("plain text: whoever reaches this address can read, forge and take part", address=address)
    running = asyncio.ensure_future(_run(job, options.exit_when_done, secured))
    try:
        await _first(running, stop)
    finally:
        await health.enter_graceful_shutdown()
        job.events.close()
        if secured is not None:
            await secured.enrollment.stop(0)
        await server.stop(GRACE_S)
        await job.finish_work()
        job.plans.close()
        _log.info("stopped", address=address, round=job.state.round, phase=job.state.phase.value)


async def _secure(job: Job, server: grpc.aio.Server, listening: _Listening, secured: Secured) -> None:
    """Renews certificates and enrols from now on, and tells the guard whose a task is."""
    certificates = secured.certificates
    add_CertificatesServicer_to_server(CertificatesService(certificates), server)
    secured.guard.owner_of = job.owner_of
    await secured.guard.look()
    if listening.enrollment is not None:
        await secured.enrollment.start()
        await asyncio.to_thread(certificates.note_enrollment, str(listening.enrollment))


def _write_port(path: Path, port: int) -> None:
    with disk_errors("the port cannot be written to --port-file", path.parent):
        write_atomically(path, f"{port}\n".encode())


async def _run(job: Job, exit_when_done: bool, secured: Secured | None) -> None:
    """Ends when the job is done and every live device knows; without `exit_when_done` only by an error."""
    work = {asyncio.ensure_future(_course(job, exit_when_done))}
    if secured is not None:
        work.add(asyncio.ensure_future(secured.keep_up()))
    try:
        done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
        for each in done:
            each.result()
    finally:
        for each in work:
            each.cancel()
        await asyncio.wait(work)


async def _course(job: Job, exit_when_done: bool) -> None:
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
