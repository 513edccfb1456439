"""What one device may ask for: every limit refuses, and lets in again when its time has passed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from fedepth_wire.channel import open_channel
from fedepth_wire.v1 import federation_pb2 as pb
from structlog.testing import capture_logs

from coordinator.security import guard as guards
from coordinator.security.limits import LIMITS, LOG_EVERY_S, READ, WRITTEN, Limits, limit_of
from coordinator.security.rules import RULES
from tests.coordinator.security.conftest import DEVICE, OTHER, Made
from tests.coordinator.security.test_guard import DENIED, OK, REQUESTS, Rig, ended, play, started

KINDS = sorted({method.rpartition("/")[2] for method in RULES})
BUSY = grpc.StatusCode.RESOURCE_EXHAUSTED


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_every_method_that_is_served_has_a_limit() -> None:
    assert set(KINDS) <= set(LIMITS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_refuses_and_recovers(kind: str, clock: Clock) -> None:
    limits: Limits[int] = Limits(clock)
    limit = limit_of(kind)
    assert [limits.take("a", "kitchen", kind) for _ in range(limit.burst)] == [""] * limit.burst
    why = limits.take("a", "kitchen", kind)
    found = re.fullmatch(rf"busy: kitchen calls {kind} more often than .*; come back in ([0-9]+) s", why)
    assert found
    assert limits.take("b", "cellar", kind) == ""  # of another device, nothing has come yet
    clock.now += int(found[1])
    assert limits.take("a", "kitchen", kind) == ""
    clock.now += limit.burst / limit.per_s
    assert [limits.take("a", "kitchen", kind) for _ in range(limit.burst)] == [""] * limit.burst
    assert limits.refused == 1


def test_of_too_many_calls_the_oldest_is_ended(clock: Clock) -> None:
    limits: Limits[int] = Limits(clock)
    most = limit_of("UploadPart").at_once
    assert [limits.enter("a", "kitchen", "UploadPart", call) for call in range(most)] == [None] * most
    assert limits.enter("a", "kitchen", "FetchFile", 100) is None
    assert limits.enter("b", "cellar", "UploadPart", 200) is None
    assert limits.enter("a", "kitchen", "UploadPart", most) == 0
    limits.leave("a", "UploadPart", 0)  # that one, a little later
    limits.leave("a", "UploadPart", 3)
    assert limits.enter("a", "kitchen", "UploadPart", most + 1) is None
    assert limits.enter("a", "kitchen", "UploadPart", most + 2) == 1


def test_messages_wait_and_are_not_refused(clock: Clock) -> None:
    limits: Limits[int] = Limits(clock)
    assert not any(limits.message_pause("a", READ) for _ in range(2000))
    assert limits.message_pause("a", READ) == pytest.approx(1 / 500)
    assert limits.message_pause("a", READ) == pytest.approx(2 / 500)  # of another stream, and after that
    assert limits.message_pause("b", READ) == 0
    assert limits.message_pause("a", WRITTEN) == 0
    clock.now += 1
    assert limits.message_pause("a", READ) == 0
    assert limits.refused == 0


@pytest.mark.parametrize(
    ("kind", "per_s"),
    [
        # An agent: asks again after a pause of 0.5 s or more, reports progress every 5 s and at the start of a phase,
        # and begins a stream again as soon as it is cut. On the worst link of benchmarks.links, which is cut every
        # 40 kB, that is five times a second with what a handshake takes; the benchmark's own device asks as often.
        ("NextTask", 5),
        ("ReportProgress", 2),
        ("FetchFile", 20),
        ("UploadPart", 20),
        ("CommitUpdate", 5),
    ],
)
def test_an_agent_on_a_bad_link_meets_no_limit(kind: str, per_s: int, clock: Clock) -> None:
    limits: Limits[int] = Limits(clock)
    for _ in range(600 * per_s):
        assert limits.take("a", "kitchen", kind) == ""
        clock.now += 1 / per_s


def test_what_is_remembered_is_bounded(clock: Clock) -> None:
    limits: Limits[int] = Limits(clock, most_remembered=100)
    for number in range(1000):
        limits.take(f"device {number}", "x", "NextTask")
        limits.enter(f"device {number}", "x", "NextTask", number)
        limits.take("busy one", "x", "NextTask")
    assert len(limits._known) == 100
    assert limits.take("busy one", "x", "NextTask") != ""  # who calls is not forgotten
    limits.leave("device 1", "NextTask", 1)  # that was


def test_it_is_said_once_in_a_while_and_counted(clock: Clock) -> None:
    limits: Limits[int] = Limits(clock)
    with capture_logs() as logs:
        for _ in range(1000):
            limits.take("device a", "kitchen", "Renew")
        clock.now += LOG_EVERY_S
        for _ in range(20):
            limits.take("device a", "kitchen", "Renew")
    assert [(each["device"], each["call"], each["times"]) for each in logs] == [
        ("kitchen", "Renew", 1),
        ("kitchen", "Renew", 995),
    ]
    assert limits.refused == 995 + 20


# --- behind a real guard


def test_a_device_that_asks_too_often_is_refused_and_others_are_served(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "HELD_S", 0)
    clock = Clock()

    async def scene(rig: Rig) -> None:
        rig.guard._limits = Limits(clock)
        async with (
            open_channel(rig.address, made.device()) as hostile,
            open_channel(rig.address, made.device("cellar", OTHER)) as honest,
        ):
            for method in ("Renew", "JobStatus"):
                request = REQUESTS[method](DEVICE, "")
                codes = [(await ended(started(hostile, method, request)))[0] for _ in range(LIMITS[method].burst + 40)]
                allowed = OK if method == "Renew" else DENIED  # what it may not call at all is counted as well
                assert codes == [allowed] * LIMITS[method].burst + [BUSY] * 40
                assert (await ended(started(honest, method, REQUESTS[method](OTHER, ""))))[0] is allowed
                clock.now += 2 / LIMITS[method].per_s
                assert (await ended(started(hostile, method, request)))[0] is allowed
        assert rig.guard._limits.refused == 80

    play(made, scene)


def test_a_refusal_comes_late_but_not_for_more_than_one_connection(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "HELD_S", 3600)
    monkeypatch.setattr(guards, "_MOST_HELD", 4)
    clock = Clock()

    async def scene(rig: Rig) -> None:
        rig.guard._limits = Limits(clock)
        request = REQUESTS["Renew"](DEVICE, "")
        async with open_channel(rig.address, made.device()) as channel:
            for _ in range(LIMITS["Renew"].burst):
                assert (await ended(started(channel, "Renew", request)))[0] is OK
            calls = [asyncio.ensure_future(ended(started(channel, "Renew", request))) for _ in range(5)]
            done, held = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            assert [each.result()[0] for each in done] == [BUSY] and len(held) == 4
            for each in held:
                each.cancel()
            await asyncio.wait(held)

    play(made, scene)


def test_who_was_revoked_is_answered_late_too(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been revoked because it floods."""
    held: list[str] = []

    async def hold(guard: guards.Guard, who: str, size_bytes: int) -> None:
        held.append(who)

    monkeypatch.setattr(guards.Guard, "_hold", hold)

    async def scene(rig: Rig) -> None:
        async with open_channel(rig.address, made.device()) as channel:
            made.certificates.registry.revoke("kitchen")
            await rig.guard.look()
            code, why = await ended(started(channel, "Renew", REQUESTS["Renew"](DEVICE, "")))
            assert code is grpc.StatusCode.UNAUTHENTICATED and "was revoked" in why

    play(made, scene)
    assert held == [f"device {DEVICE}"]


def test_the_oldest_of_too_many_streams_is_told_why(made: Made) -> None:
    async def scene(rig: Rig) -> None:
        most = LIMITS["FetchFile"].at_once
        async with open_channel(rig.address, made.device()) as channel:
            calls = []
            for _ in range(most + 1):
                calls.append(started(channel, "FetchFile", pb.FetchFileRequest(verify=True)))
                await calls[-1].read()
            code, why = await ended(calls[0])
            assert code is BUSY
            assert (
                why == f"busy: more than {most} calls of FetchFile at once, and this was the oldest; come back in 1 s"
            )
            assert not any(call.done() for call in calls[1:])
            for call in calls:
                call.cancel()

    play(made, scene)


def test_a_flood_of_messages_is_read_slowly(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, paused = Clock(), []

    async def sleep(seconds: float) -> None:
        paused.append(seconds)

    monkeypatch.setattr(guards, "asyncio", _WithSleep(sleep))

    async def scene(rig: Rig) -> None:
        rig.guard._limits = Limits(clock)

        async def requests() -> AsyncIterator[Any]:
            for _ in range(2010):
                yield pb.UploadPartRequest(header=pb.UploadHeader(device_id=DEVICE))

        async with open_channel(rig.address, made.device()) as channel:
            call = channel.stream_stream(
                "/fedepth_wire.v1.Federation/UploadPart",
                request_serializer=pb.UploadPartRequest.SerializeToString,
                response_deserializer=pb.UploadPartReply.FromString,
            )(requests())
            assert (await ended(call))[0] is OK

    play(made, scene)
    assert len(paused) == 11  # the end of the stream is read as well
    assert paused[-1] == pytest.approx(11 / 500)


def test_what_is_written_counts_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device decides in which pieces a file is sent to it."""
    paused, written = [], []

    async def sleep(seconds: float) -> None:
        paused.append(seconds)

    class Context:
        async def write(self, message: int) -> None:
            written.append(message)

    monkeypatch.setattr(guards, "asyncio", _WithSleep(sleep))
    limits: Limits[Any] = Limits(Clock())
    context: Any = guards._Read(Context(), lambda encoded: encoded, lambda kind: limits.message_pause("a", kind))  # type: ignore[arg-type]

    async def scene() -> None:
        for number in range(2010):
            await context.write(number)

    asyncio.run(scene())
    assert written == list(range(2010))
    assert len(paused) == 10 and paused[-1] == pytest.approx(10 / 500)


class _WithSleep:
    """asyncio with another sleep."""

    def __init__(self, sleep: Any) -> None:
        self.sleep = sleep

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)
