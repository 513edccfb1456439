"""Messages that no agent sends: numbers and lists without bounds, ids of others, parts without end. Over raw gRPC."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
from fedepth_wire.channel import open_channel
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationStub

from benchmarks.faults.evidence import entries
from benchmarks.faults.scenario import Kind, Scene, recover
from benchmarks.lab import status_bytes
from benchmarks.simulated_device import Part, SimulatedDevice, encoded
from fedepth.errors import ChildError
from fedepth.task import Task

MOST_MEMORY_BYTES = 128 << 20  # that an attack may add to the coordinator's peak
MOST_DISK_BYTES = 32 << 20  # and to its spools
MOST_SILENCE_S = 3.0  # for which nobody else is served
MOST_SAMPLES = 2**63 - 1
_ASKS = 12

Attack = Callable[[Scene, SimulatedDevice], Awaitable[None]]


def kinds() -> Iterator[Kind]:
    """Every kind of this module."""
    for attack in (
        many_samples,
        many_class_counts,
        names_beside_a_digest,
        many_stages,
        many_digests,
        many_attempts,
        attempts_backwards,
        huge_texts,
        foreign_tasks,
        odd_numbers,
        damaged_parts,
        odd_losses,
    ):
        yield Kind(f"hostile: {attack.__name__.replace('_', ' ')}", _play(attack))


async def many_samples(scene: Scene, device: SimulatedDevice) -> None:
    """A device that has trained on 2^63 - 1 samples."""
    device.samples = MOST_SAMPLES
    task = await _task(device)
    if task is not None:
        await _deliver(scene, device, task)
    device.samples = 64
    task = await _task(device)
    if task is not None:
        device.samples = MOST_SAMPLES
        await _deliver(scene, device, task)


async def many_class_counts(scene: Scene, device: SimulatedDevice) -> None:
    """Lists of four million numbers in a message that is below the limit."""
    await device.ask(device.report(class_counts=[1] * 4_100_000), wait_s=1)


async def names_beside_a_digest(scene: Scene, device: SimulatedDevice) -> None:
    """Names and counts in a report that says that they go by digest."""
    names, counts = ["x"] * 65_536, [1] * 65_536
    report = device.report(data_digest="0" * 64, folder_names=names, folder_counts=counts)
    for _ in range(_ASKS):
        await _try(device.ask(report, wait_s=0.1))


async def many_stages(scene: Scene, device: SimulatedDevice) -> None:
    """200 stages of 65,536 units each, and ten thousand of one."""
    task = await _must_have(device)
    stage = task.plan.stages[0]
    for stages in ((replace(stage, first=0, last=65535),) * 200, (replace(stage, first=0, last=0),) * 10_000):
        plan = replace(task.plan, stages=stages)
        result = replace(device.result(task, task.plan, [Part(0, b"x")]), plan=plan, trained_units=())
        await _try(device.commit(result))


async def many_digests(scene: Scene, device: SimulatedDevice) -> None:
    """One part under a hundred digests, none of them whole."""
    task = await _must_have(device)
    size = task.weights_bytes
    for number in range(100):
        part = Part(0, scene.chance.randbytes(64) + bytes(size - 64))
        await _try(device.upload(task, part, size_bytes=size + 1, digest=f"{number:064x}"))


async def many_attempts(scene: Scene, device: SimulatedDevice) -> None:
    """A task that is asked for again and again, with an unfinished part each time."""
    for number in range(30):
        task = await device.next_task(wait_s=5)
        if task is not None:
            part = Part(0, bytes(task.weights_bytes))
            await _try(device.upload(task, part, size_bytes=len(part.data) + 1, digest=f"{number:064x}"))


async def attempts_backwards(scene: Scene, device: SimulatedDevice) -> None:
    """A part of each of many attempts, the last attempt first."""
    task = await _must_have(device)
    for _ in range(10):
        task = await device.next_task(wait_s=5) or task
    part = Part(0, bytes(task.weights_bytes))
    for attempt in range(task.attempt, 0, -1):
        await _try(device.upload(task, part, attempt=attempt, size_bytes=len(part.data) + 1))


async def huge_texts(scene: Scene, device: SimulatedDevice) -> None:
    """Names and messages of megabytes, with terminal codes and markup in them."""
    text = "\x1b[2J[red]" * 300_000
    for field in ("name", "hardware", "software", "device_id"):
        await _try(device.ask(device.report(**{field: text}), wait_s=0.1))
    task = await _must_have(device)
    failure = pb.Failure(
        task_id=task.task_id, attempt=task.attempt, device_id=device.device_id, outcome=pb.OUTCOME_ERROR, message=text
    )
    await _try(device.stub.ReportFailure(failure, timeout=20))
    await _try(device.stub.ReportProgress(pb.Progress(task_id=text, device_id=text), timeout=20))


async def foreign_tasks(scene: Scene, device: SimulatedDevice) -> None:
    """Ids of others' tasks, of none, and of files."""
    task = await _must_have(device)
    given = [e["task_id"] for e in entries(scene.federation.journal("coordinator")) if e.get("event") == "task_given"]
    part = await device.update(task, task.plan, 1e-3, scene.seed)
    for name in (*given[-6:], "no-such-task", "../../../tmp/x", "", "x" * 100_000):
        if name == task.task_id:
            continue
        await _try(device.upload(task, part, task_id=name))
        await _try(device.commit(replace(device.result(task, task.plan, [part]), task_id=name)))
        await _try(
            device.stub.ReportFailure(pb.Failure(task_id=name, attempt=1, device_id=device.device_id), timeout=20)
        )
        await _try(device.stub.ReportProgress(pb.Progress(task_id=name, device_id=device.device_id), timeout=20))
    wrong = {"task_id": "../../x", "attempt": -1, "part": 2**62, "digest": "../../../etc/passwd"}
    await _try(device.upload(task, part, **wrong))


async def odd_numbers(scene: Scene, device: SimulatedDevice) -> None:
    """Negative, endless and undefined numbers in everything that a device says of itself."""
    for number in (-1, MOST_SAMPLES, -(2**63)):
        await _try(device.ask(device.report(budget=pb.Budget(budget_bytes=number, total_bytes=number)), wait_s=0.1))
        await _try(device.ask(device.report(sample_count=number), wait_s=0.1))
    for share in (math.nan, math.inf, -1e308):
        calibration = pb.Calibration(allocator="a", torch="t", fixed_bytes=-1, kept=share, kernel_share=share)
        await _try(device.ask(device.report(calibration=calibration), wait_s=0.1))
    task = await _must_have(device)
    part = await device.update(task, task.plan, 1e-3, scene.seed)
    await _try(device.upload(task, part, size_bytes=2**62))
    await _try(device.upload(task, part, size_bytes=-1))
    await _try(device.upload(task, part, attempt=2**62))
    await _try(device.upload(task, part, part=2**62))
    result = device.result(task, task.plan, [part])
    for changes in ({"sample_count": -1}, {"attempt": 2**62}, {"round": -(2**62)}, {"seconds": math.inf}):
        await _try(device.commit(replace(result, **changes)))


async def damaged_parts(scene: Scene, device: SimulatedDevice) -> None:
    """Parts that are no weights: random bytes, a header without end, values that are no numbers."""
    for kind in range(4):
        task = await _must_have(device)
        tensors = await device.weights(task)
        wrong = {name: tensor * math.nan for name, tensor in tensors.items()}
        data = (
            scene.chance.randbytes(10_000),
            (2**62).to_bytes(8, "little") + b"{}",
            (200_000).to_bytes(8, "little") + b"[" * 200_000,
            encoded(wrong),
        )[kind]
        part = Part(0, data)
        await _try(device.upload(task, part))
        reply = await _try(device.commit(device.result(task, task.plan, [part])))
        if isinstance(reply, pb.CommitUpdateReply) and reply.WhichOneof("outcome") == "accepted":
            scene.fail(f"damaged part {kind} was accepted")


async def odd_losses(scene: Scene, device: SimulatedDevice) -> None:
    """A good update with losses that are no numbers."""
    for loss in (math.nan, math.inf):
        task = await _must_have(device)
        part = await device.update(task, task.plan, 1e-3, scene.seed)
        await _try(device.upload(task, part))
        result = device.result(task, task.plan, [part])
        result = replace(result, stages=tuple(replace(stage, loss_last=loss) for stage in result.stages))
        reply = await _try(device.commit(result))
        if isinstance(reply, pb.CommitUpdateReply) and reply.WhichOneof("outcome") == "accepted":
            scene.fail(f"an update with the loss {loss} was accepted")


async def _task(device: SimulatedDevice) -> Task | None:
    """A task, if the device is drawn for one soon."""
    for _ in range(_ASKS):
        try:
            task = await device.next_task(wait_s=5)
        except grpc.aio.AioRpcError:
            continue
        if task is not None:
            return task
    return None


async def _must_have(device: SimulatedDevice) -> Task:
    task = await _task(device)
    if task is None:
        raise ChildError(f"{device.device_id} got no task")
    return task


async def _deliver(scene: Scene, device: SimulatedDevice, task: Task) -> None:
    part = await device.update(task, task.plan, 1e-3, scene.seed)
    (scene.federation.archive / part.info.digest).write_bytes(part.data)
    await _try(device.upload(task, part))
    await _try(device.commit(device.result(task, task.plan, [part])))


async def _try(call: Awaitable[object]) -> object:
    """What it answers; a status is an answer, too."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        return error.code()


def _play(attack: Attack) -> Callable[[Scene], None]:
    def play(scene: Scene) -> None:
        federation = scene.federation
        pid = federation.pid("coordinator")
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM counts from here on
        memory, disk = status_bytes(pid, "VmRSS"), _size(federation.state / "spool")
        silence, largest = asyncio.run(_attacked(scene, attack))
        scene.fired += 1
        if federation.pid("coordinator") != pid:
            scene.fail("the coordinator did not survive")
        elif (peak := status_bytes(pid, "VmHWM") - memory) > MOST_MEMORY_BYTES:
            scene.fail(f"the coordinator's memory grew by {peak >> 20} MiB")
        if largest - disk > MOST_DISK_BYTES:
            scene.fail(f"its spools grew by {(largest - disk) >> 20} MiB")
        if silence > MOST_SILENCE_S:
            scene.fail(f"nobody else was served for {silence:.1f} s")
        recover(scene)

    return play


async def _attacked(scene: Scene, attack: Attack) -> tuple[float, int]:
    """The longest time that a question for the status took meanwhile, and the largest size of the spools."""
    address, certificates = f"127.0.0.1:{scene.federation.port}", scene.federation.certificates
    slowest, largest = 0.0, 0

    async def watch() -> None:
        nonlocal slowest, largest
        async with open_channel(address, certificates.operator) as channel:
            stub = FederationStub(channel)
            while True:
                begun = time.monotonic()
                await _try(stub.JobStatus(pb.JobStatusRequest(), timeout=60))
                slowest = max(slowest, time.monotonic() - begun)
                largest = max(largest, _size(scene.federation.state / "spool"))
                await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    device_id, identity = certificates.device(f"hostile-{scene.seed}")
    async with open_channel(address, identity) as channel:
        device = SimulatedDevice(channel, device_id)
        try:
            await attack(scene, device)
        except grpc.aio.AioRpcError as error:
            scene.say(f"answered {error.code().name}")
        finally:
            watching.cancel()
            await asyncio.wait({watching})
    return slowest, largest


def _size(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        try:
            total += sum(file.stat().st_size for file in path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            continue  # a round has closed
    return total
