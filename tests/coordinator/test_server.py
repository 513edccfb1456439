"""The server process: binding, health, reflection, its end, and what it must not import."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fedepth_wire.channel import open_channel
from fedepth_wire.convert import to_message
from fedepth_wire.tls import INSECURE
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationStub
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from coordinator.front import ServeOptions
from coordinator.security.certificates import Certificates
from coordinator.server import serve
from edge_client.enroll import enroll_with_token
from fedepth.address import parse_address
from fedepth.errors import TransportError


async def address_in(port_file: Path, serving: asyncio.Task[None]) -> str:
    while not port_file.exists():
        assert not serving.done(), serving.result()
        await asyncio.sleep(0)
    return f"127.0.0.1:{port_file.read_text().strip()}"


def start(folder: Path, config: Any, models: Any, **options: Any) -> asyncio.Task[None]:
    made = ServeOptions(folder / "state", port=0, port_file=folder / "port", certificates=INSECURE, **options)
    return asyncio.create_task(serve(config, made, models))


def test_it_serves_health_and_reflection_until_sigterm(tmp_path: Path, kit: Any) -> None:
    async def scene() -> None:
        models = kit.models()
        serving = start(tmp_path, kit.config(), models)
        async with open_channel(await address_in(tmp_path / "port", serving), INSECURE) as channel:
            for name in ("", "fedepth_wire.v1.Federation"):
                request = health_pb2.HealthCheckRequest(service=name)
                reply = await health_pb2_grpc.HealthStub(channel).Check(request)
                assert reply.status == health_pb2.HealthCheckResponse.SERVING

            async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
                yield reflection_pb2.ServerReflectionRequest(list_services="")

            listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(ask())
            services = [each.name async for one in listing for each in one.list_services_response.service]
            assert "fedepth_wire.v1.Federation" in services
            watching = FederationStub(channel).Watch(pb.WatchRequest())
            assert '"state"' in (await watching.read()).json
            os.kill(os.getpid(), signal.SIGTERM)
            await serving
            assert models.stopped

    asyncio.run(asyncio.wait_for(scene(), 30))


def test_exit_when_done_makes_up_for_a_crash_and_ends(tmp_path: Path, kit: Any) -> None:
    """A job whose last round is recorded, but neither evaluated nor exported, and no device about."""

    async def scene() -> None:
        store_finished_job(tmp_path / "state", kit)
        models = kit.models()
        serving = start(tmp_path, kit.config(), models, exit_when_done=True)
        await asyncio.wait_for(serving, 20)
        assert models.asked == ["prepare", "evaluate", "export"]  # what the crash had left undone

    asyncio.run(scene())


def store_finished_job(state: Path, kit: Any) -> None:
    from coordinator.store.entries import RoundRecord
    from coordinator.store.records import Store
    from fedepth.job import model_spec

    store = Store.open(state, "demo", model_spec(kit.config()))
    for number in (0, 1):
        partial = state / "weights" / "new.partial"
        partial.write_bytes(b"weights %d" % number)
        sealed = store.seal_weights(partial, number)
        store.record_round(RoundRecord(number, sealed.digest, sealed.size_bytes, 0.0, 2, 40))
    store.close()


def test_without_exit_when_done_devices_are_told_that_it_is_finished(tmp_path: Path, kit: Any) -> None:
    async def scene() -> None:
        store_finished_job(tmp_path / "state", kit)
        serving = start(tmp_path, kit.config(), kit.models())
        async with open_channel(await address_in(tmp_path / "port", serving), INSECURE) as channel:
            report = to_message(kit.report("a"), pb.DeviceReport)
            request = pb.NextTaskRequest(device=report, wait_ms=10_000)
            reply = await FederationStub(channel).NextTask(request)
            assert reply.finished.rounds == 1
        assert not serving.done()
        os.kill(os.getpid(), signal.SIGINT)
        await serving

    asyncio.run(asyncio.wait_for(scene(), 30))


def test_a_port_in_use_is_told_with_what_to_do(tmp_path: Path, kit: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        models = kit.models()
        with pytest.raises(TransportError, match=rf"cannot listen on 127\.0\.0\.1:{port}.*--port"):
            asyncio.run(serve(kit.config(), ServeOptions(tmp_path, port=port, certificates=INSECURE), models))
        assert models.asked == []


def test_the_server_imports_neither_torch_nor_onnx() -> None:
    code = (
        "import sys, coordinator.server, coordinator.cli, coordinator.model_worker.client\n"
        "heavy = {'torch', 'torchvision', 'onnx', 'onnxruntime', 'sklearn', 'numpy'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_devices_are_enrolled_while_the_model_is_prepared(tmp_path: Path, kit: Any) -> None:
    """That takes a minute, in which somebody at the other terminal goes on with what comes next."""
    certificates = Certificates(tmp_path / "certificates")
    certificates.init()
    models = Preparing(kit.models())

    async def scene() -> None:
        options = ServeOptions(tmp_path / "state", port=0, enroll_port=0, certificates=certificates)
        serving = asyncio.create_task(serve(kit.config(), options, models))
        await models.begun.wait()
        token, _ = certificates.make_token("kitchen", 60)
        address = parse_address(certificates.enrollment_address())
        facts = await asyncio.to_thread(enroll_with_token, address, token, tmp_path / "device")
        assert facts.name == "kitchen"
        os.kill(os.getpid(), signal.SIGTERM)
        await serving

    asyncio.run(asyncio.wait_for(scene(), 30))


class Preparing:
    """A model worker that is never done with the model."""

    def __init__(self, models: Any) -> None:
        self.begun = asyncio.Event()
        self.stop = models.stop

    async def request(self, do: str, **fields: Any) -> dict[str, Any]:
        self.begun.set()
        await asyncio.Event().wait()
        raise AssertionError
