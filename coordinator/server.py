"""The server process: opens the state, binds the port, runs the job, and ends in order.

It imports neither torch nor onnx: what needs a model is done by the model worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import structlog
from fedepth_wire.channel import SERVER_OPTIONS, TLS_SERVER_OPTIONS
from fedepth_wire.tls import Insecure

from coordinator.front import Front, Listening, ServeOptions
from coordinator.global_model import prepare
from coordinator.job import Job
from coordinator.listening import NoServer, Server, listen, most_connections
from coordinator.model_worker.client import Models
from coordinator.security.serving import Secured
from coordinator.start_checks import Examine, Findings, disk_findings, nothing_to_find, together, writable
from coordinator.store.entries import Prepared
from coordinator.store.records import Store
from coordinator.survey import Survey
from fedepth.errors import ConfigError, FedepthError, StartError, StateError
from fedepth.job import model_spec
from fedepth.job_changes import refusal, settings_of
from fedepth.job_rows import lacks_statistics, with_statistics
from fedepth.job_sections import JobConfig
from fedepth.program import stop_on_signals

FAREWELL_S = 10.0
THREADS = 32  # for files and buckets: one that hangs must not hold up those that work

_log = structlog.get_logger()


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
    usual = TLS_SERVER_OPTIONS if secured else SERVER_OPTIONS
    connections = most_connections()
    server = grpc.aio.server(
        options=[*usual, ("grpc.max_allowed_incoming_connections", connections)], interceptors=interceptors
    )
    _log.info("connections", most=connections)
    # In threads, also before there is anybody to serve: a signal has to be heard.
    store, listening = await asyncio.to_thread(_opened, config, options, server, examining.result(), missing, secured)
    front = Front(server, listening, options, secured)
    try:
        if stop.is_set():
            return
        await front.enroll()
        prepared = await _prepared(config, store, models, stop)
        if prepared is None:
            return
        surveyed = await _surveyed(config, store, front, stop)
        if surveyed is not None:
            job = await asyncio.to_thread(Job, surveyed, store, models, prepared)
            await _serve_job(job, front, stop)
    finally:
        await front.close()
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
) -> tuple[Store, Listening]:
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
) -> tuple[Listening | None, list[FedepthError]]:
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
            return Listening(address), errors
        port = options.enroll_port
        enrollment = listen(secured.enrollment, options.host, port, for_enrollment, "--enroll-port")
    except FedepthError as error:
        return None, [*errors, error]
    return Listening(address, enrollment), errors


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


async def _prepared(config: JobConfig, store: Store, models: Models, stop: asyncio.Event) -> Prepared | None:
    """None if a signal came while the model was being prepared."""
    preparing = asyncio.ensure_future(prepare(config, store, models))
    if not await _first(preparing, stop):
        return None
    disk = await asyncio.to_thread(_disk, config, store)  # again, now that the size of the model is known
    disk.tell()
    if disk.problems:
        raise StartError(disk.problems[0])
    return preparing.result()


async def _surveyed(config: JobConfig, store: Store, front: Front, stop: asyncio.Event) -> JobConfig | None:
    """The job with what its devices have in the columns of its table; None if a signal came meanwhile."""
    if not lacks_statistics(config):
        return config
    found = await store.short(store.statistics)
    if found is None:
        survey = await asyncio.to_thread(Survey, config, store)
        front.service.ask(survey)
        await front.open(config.job.name)
        asking = asyncio.ensure_future(front.beside(survey.statistics()))
        if not await _first(asking, stop):
            return None
        found = asking.result()
    return with_statistics(config, found)


async def _serve_job(job: Job, front: Front, stop: asyncio.Event) -> None:
    if front.secured is not None:
        front.secured.guard.owner_of = job.owner_of
    front.service.serve(job)
    await front.open(job.config.job.name)
    running = asyncio.ensure_future(front.beside(_course(job, front.exit_when_done)))
    try:
        await _first(running, stop)
    finally:
        await front.announce_end()
        job.events.close()
        await front.close()
        await job.finish_work()
        job.plans.close()
        _log.info("stopped", address=front.address, round=job.state.round, phase=job.state.phase.value)


async def _course(job: Job, exit_when_done: bool) -> None:
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
