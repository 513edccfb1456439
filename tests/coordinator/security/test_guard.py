"""Who may call what, over real connections: every method of every service, for every kind of caller."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from fedepth_wire.channel import open_channel
from fedepth_wire.tls import Identity, Role
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1 import trust_pb2
from fedepth_wire.v1.federation_pb2_grpc import FederationServicer, FederationStub, add_FederationServicer_to_server
from fedepth_wire.v1.trust_pb2_grpc import CertificatesServicer, CertificatesStub, add_CertificatesServicer_to_server
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from coordinator.security import guard as guards
from coordinator.security.rules import RULES
from tests.coordinator.security.conftest import DAY_S, DEVICE, OTHER, Made, guarded

MINE, ANOTHERS = "task-of-the-caller", "task-of-another"
OK, DENIED, UNKNOWN = grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED

# Per method: a request in the name of a device, about a task. A new RPC has no line here, and fails the first test.
REQUESTS: dict[str, Callable[[str, str], Any]] = {
    "NextTask": lambda device, task: pb.NextTaskRequest(device=pb.DeviceReport(device_id=device)),
    "FetchFile": lambda device, task: pb.FetchFileRequest(digest="0" * 64),
    "DescribeData": lambda device, task: pb.UploadPartRequest(header=pb.UploadHeader(device_id=device)),
    "UploadPart": lambda device, task: pb.UploadPartRequest(header=pb.UploadHeader(task_id=task, device_id=device)),
    "CommitUpdate": lambda device, task: pb.CommitUpdateRequest(result=pb.Result(task_id=task, device_id=device)),
    "ReportFailure": lambda device, task: pb.Failure(task_id=task, device_id=device),
    "ReportProgress": lambda device, task: pb.Progress(task_id=task, device_id=device),
    "JobStatus": lambda device, task: pb.JobStatusRequest(),
    "Watch": lambda device, task: pb.WatchRequest(),
    "Renew": lambda device, task: trust_pb2.RenewRequest(),
}
OF_OPERATORS = {"JobStatus", "Watch"}
STREAMS = {"FetchFile", "DescribeData", "UploadPart"}
IN_A_NAME = {"NextTask", "DescribeData", "UploadPart", "CommitUpdate", "ReportFailure", "ReportProgress"}
ABOUT_A_TASK = {"UploadPart", "CommitUpdate", "ReportFailure", "ReportProgress"}


class Reached(FederationServicer, CertificatesServicer):
    """Notes what came through, and answers with nothing."""

    def __init__(self) -> None:
        self.methods: list[str] = []
        self.waiting = asyncio.Event()

    async def NextTask(self, request: Any, context: Any) -> pb.NextTaskReply:
        self.methods.append("NextTask")
        if request.wait_ms:
            self.waiting.set()
            await asyncio.Event().wait()
        return pb.NextTaskReply()

    # Streams are read in both of grpc's ways: through the context, as the coordinator does, and as an iterator.
    async def FetchFile(self, request_iterator: Any, context: Any) -> None:
        request = await context.read()
        self.methods.append("FetchFile")
        await context.write(pb.Chunk(data=b"x"))
        if request.verify:
            await asyncio.Event().wait()

    async def UploadPart(self, request_iterator: Any, context: Any) -> None:
        while await context.read() is not grpc.aio.EOF:
            self.methods.append("UploadPart")

    async def DescribeData(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.UploadPartReply]:
        async for _ in request_iterator:
            self.methods.append("DescribeData")
            yield pb.UploadPartReply()

    async def CommitUpdate(self, request: Any, context: Any) -> pb.CommitUpdateReply:
        self.methods.append("CommitUpdate")
        return pb.CommitUpdateReply()

    async def ReportFailure(self, request: Any, context: Any) -> pb.Ack:
        self.methods.append("ReportFailure")
        return pb.Ack()

    async def ReportProgress(self, request: Any, context: Any) -> pb.Ack:
        self.methods.append("ReportProgress")
        return pb.Ack()

    async def JobStatus(self, request: Any, context: Any) -> pb.JobStatusReply:
        self.methods.append("JobStatus")
        return pb.JobStatusReply()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[pb.Event]:
        self.methods.append("Watch")
        yield pb.Event(json="{}")

    async def Renew(self, request: Any, context: Any) -> trust_pb2.RenewReply:
        self.methods.append("Renew")
        return trust_pb2.RenewReply()


class Rig:
    """A guarded server, and calls to it."""

    def __init__(self, made: Made, guard: Any, address: str, servicer: Reached) -> None:
        self.made, self.guard, self.address, self.servicer = made, guard, address, servicer

    async def call(self, identity: Identity, method: str, *requests: Any) -> tuple[grpc.StatusCode, str]:
        """How one call ends."""
        async with open_channel(self.address, identity) as channel:
            while True:
                code, why = await ended(started(channel, method, *requests))
                # grpc puts this over the true status of a stream that ends during a write (grpc/aio/_call.py, _write).
                if (code, why) != (grpc.StatusCode.INTERNAL, "Internal error from Core"):
                    return code, why


def started(channel: Any, method: str, *requests: Any) -> Any:
    if method == "Renew":
        return CertificatesStub(channel).Renew(*requests)
    if method in STREAMS:

        async def each() -> AsyncIterator[Any]:
            for request in requests:
                yield request

        return getattr(FederationStub(channel), method)(each())
    return getattr(FederationStub(channel), method)(*requests)


async def ended(call: Any) -> tuple[grpc.StatusCode, str]:
    try:
        if hasattr(call, "read"):
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return await call.code(), ""


def play(made: Made, scene: Callable[[Rig], Any]) -> None:
    async def main() -> None:
        servicer = Reached()

        def add(server: grpc.aio.Server) -> None:
            add_FederationServicer_to_server(servicer, server)
            add_CertificatesServicer_to_server(servicer, server)
            health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
            reflection.enable_server_reflection((reflection.SERVICE_NAME,), server)

        async with guarded(made, add) as (guard, address):
            guard.owner_of = {MINE: DEVICE, ANOTHERS: OTHER}.get
            await scene(Rig(made, guard, address, servicer))

    asyncio.run(asyncio.wait_for(main(), 60))


def test_every_method_has_a_rule_and_a_line_here() -> None:
    services = [pb.DESCRIPTOR.services_by_name["Federation"], trust_pb2.DESCRIPTOR.services_by_name["Certificates"]]
    served = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    others = ("/grpc.health.", "/grpc.reflection.")
    assert {method for method in RULES if not method.startswith(others)} == served
    assert set(REQUESTS) == {method.rpartition("/")[2] for method in served}


def test_what_a_device_may_call(made: Made) -> None:
    async def scene(rig: Rig) -> None:
        device = made.device()
        for method, request in REQUESTS.items():
            code, why = await rig.call(device, method, request(DEVICE, MINE))
            assert code is (DENIED if method in OF_OPERATORS else OK), (method, why)
            if code is DENIED:
                assert why == f"{method} is for operators, and kitchen is a device"
        assert set(rig.servicer.methods) == set(REQUESTS) - OF_OPERATORS

    play(made, scene)


def test_what_an_operator_may_call(made: Made) -> None:
    async def scene(rig: Rig) -> None:
        operator = made.operator()
        for method, request in REQUESTS.items():
            code, why = await rig.call(operator, method, request(DEVICE, MINE))
            assert code is (OK if method in OF_OPERATORS else DENIED), (method, why)
        assert set(rig.servicer.methods) == OF_OPERATORS

    play(made, scene)


def test_nobody_speaks_in_anothers_name_or_of_anothers_task(made: Made) -> None:
    async def scene(rig: Rig) -> None:
        device = made.device()
        for method, request in REQUESTS.items():
            if method in IN_A_NAME:
                code, why = await rig.call(device, method, request(OTHER, MINE))
                assert code is DENIED, method
                assert f"kitchen is the device {DEVICE} and speaks for '{OTHER}'" in why
                code, why = await rig.call(device, method, request("", MINE))  # of nobody
                assert code is DENIED and "speaks for ''" in why, method
            if method in ABOUT_A_TASK:
                code, why = await rig.call(device, method, request(DEVICE, ANOTHERS))
                assert (code, why) == (DENIED, "this task is not one of kitchen"), method
                code, _ = await rig.call(device, method, request(DEVICE, "a task that nobody knows"))
                assert code is OK, method  # the job says what is to be said of it
        assert rig.servicer.methods == [method for method in REQUESTS if method in ABOUT_A_TASK]

    play(made, scene)


def test_a_second_header_of_a_stream_is_looked_at_as_well(made: Made) -> None:
    async def scene(rig: Rig) -> None:
        for method in ("UploadPart", "DescribeData"):
            request = REQUESTS[method]
            code, _ = await rig.call(made.device(), method, request(DEVICE, MINE), request(OTHER, MINE))
            assert code is DENIED
        assert rig.servicer.methods == ["UploadPart", "DescribeData"]

    play(made, scene)


def test_health_is_for_both_and_reflection_for_operators(made: Made) -> None:
    async def scene(rig: Rig) -> None:
        async def ask() -> AsyncIterator[Any]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        for identity, listed in ((made.device(), DENIED), (made.operator(), OK)):
            async with open_channel(rig.address, identity) as channel:
                assert (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())).status == 1
                watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                assert (await watching.read()).status == 1  # it writes by itself
                watching.cancel()
                call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(ask())
                assert (await ended(call))[0] is listed

    play(made, scene)


def test_a_method_that_is_not_served_is_unimplemented(made: Made) -> None:
    async def scene(rig: Rig) -> None:
        async with open_channel(rig.address, made.device()) as channel:
            code, _ = await ended(channel.unary_unary("/a/b")(b""))
            assert code is grpc.StatusCode.UNIMPLEMENTED

    play(made, scene)


def test_a_served_method_without_a_rule_is_for_nobody(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, "/fedepth_wire.v1.Federation/FetchFile")

    async def scene(rig: Rig) -> None:
        code, why = await rig.call(made.device(), "FetchFile", pb.FetchFileRequest())
        assert (code, why) == (DENIED, "FetchFile is for nobody, and kitchen is a device")

    play(made, scene)


@pytest.mark.parametrize("method", ["NextTask", "FetchFile"])
@pytest.mark.parametrize("end", ["revoked", "expired"])
def test_calls_that_last_end_when_their_certificate_does(made: Made, method: str, end: str) -> None:
    async def scene(rig: Rig) -> None:
        endless = {
            "NextTask": pb.NextTaskRequest(device=pb.DeviceReport(device_id=DEVICE), wait_ms=1),
            "FetchFile": pb.FetchFileRequest(verify=True),
        }
        async with open_channel(rig.address, made.device()) as channel:
            call = started(channel, method, endless[method])
            if method == "NextTask":
                ending = asyncio.ensure_future(ended(call))
                await rig.servicer.waiting.wait()
            else:
                await call.read()
                ending = asyncio.ensure_future(ended(call))
            await rig.guard.look()
            assert not ending.done()
            if end == "revoked":
                made.certificates.registry.revoke("kitchen")
            else:
                made.time.now += 31 * DAY_S
            await rig.guard.look()
            code, why = await ending
            assert code is UNKNOWN
            assert "fedepth-coordinator enroll kitchen" in why and end in why
            # The connection is as it was; the next call over it is refused all the same.
            code, why = await ended(started(channel, "NextTask", REQUESTS["NextTask"](DEVICE, "")))
            assert code is UNKNOWN and end in why
        if end == "revoked":
            again = made.device()  # of the same device, made after that
            assert (await rig.call(again, "NextTask", REQUESTS["NextTask"](DEVICE, "")))[0] is OK

    play(made, scene)


def test_who_was_revoked_stays_so_when_an_older_record_is_restored(made: Made, tmp_path: Path) -> None:
    async def scene(rig: Rig) -> None:
        device, record = made.device(), made.folder / "record.sqlite"
        shutil.copyfile(record, tmp_path / "older")
        made.certificates.registry.revoke("kitchen")
        await rig.guard.look()
        shutil.copyfile(tmp_path / "older", record)
        await rig.guard.look()
        code, why = await rig.call(device, "NextTask", REQUESTS["NextTask"](DEVICE, ""))
        assert code is UNKNOWN and "was revoked" in why

    play(made, scene)


def test_a_call_that_its_caller_ends_is_no_refusal(made: Made) -> None:
    async def scene(rig: Rig) -> None:
        async with open_channel(rig.address, made.device()) as channel:
            request = pb.NextTaskRequest(device=pb.DeviceReport(device_id=DEVICE), wait_ms=1)
            call = FederationStub(channel).NextTask(request)
            await rig.servicer.waiting.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    play(made, scene)


def test_what_the_authority_signed_and_nobody_recorded_is_not_believed(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "HELD_S", 0)

    async def scene(rig: Rig) -> None:
        for role, identifier in ((Role.DEVICE, DEVICE), (Role.OPERATOR, "boss")):
            for method, request in REQUESTS.items():
                code, why = await rig.call(made.unrecorded(role, identifier), method, request(DEVICE, MINE))
                assert code is UNKNOWN and "not in this coordinator's record" in why
        assert rig.servicer.methods == []

    play(made, scene)


@pytest.mark.parametrize("who", ["another authority's", "expired", "the coordinator's own", "none"])
def test_a_handshake_that_does_not_come_about(made: Made, make: Callable[..., Made], who: str) -> None:
    async def scene(rig: Rig) -> None:
        if who == "another authority's":
            theirs = make("others").device()
            identity = Identity(theirs.key, theirs.certificate, made.authority.pem)
        elif who == "expired":
            identity = made.device(days=-0.5)
        else:
            identity = made.certificates.coordinator()
        async with open_channel(rig.address, identity) as channel:
            if who == "none":
                channel = grpc.aio.secure_channel(rig.address, grpc.ssl_channel_credentials(made.authority.pem))
            code, _ = await ended(started(channel, "JobStatus", pb.JobStatusRequest()))
            assert code is grpc.StatusCode.UNAVAILABLE
            await channel.close()
        assert rig.servicer.methods == []

    play(made, scene)


def test_a_record_that_cannot_be_read_is_busy_and_not_open(made: Made, tmp_path: Path) -> None:
    async def scene(rig: Rig) -> None:
        device = made.device()
        (made.folder / "record.sqlite").rename(tmp_path / "away")
        await rig.guard.look()  # says so, and goes on
        code, why = await rig.call(device, "NextTask", REQUESTS["NextTask"](DEVICE, ""))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert why.endswith("; come back in 20 s")
        (tmp_path / "away").rename(made.folder / "record.sqlite")
        assert (await rig.call(device, "NextTask", REQUESTS["NextTask"](DEVICE, "")))[0] is OK

    play(made, scene)
