"""One federation in the lab, watched from its first round to its ONNX file."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from fedepth_wire.channel import open_channel
from fedepth_wire.v1.federation_pb2 import WatchRequest
from fedepth_wire.v1.federation_pb2_grpc import FederationStub
from rich.console import Console
from rich.markup import escape

from benchmarks.lab import Lab, LabDevice, describe_cap, lab, status_bytes
from fedepth.errors import ChildError
from fedepth.sizes import format_size

TIME_LIMIT_S = 600.0
AGENT_OPTIONS = ("--threads", "1", "--linger", "300", "--exit-when-done")


@dataclass(frozen=True)
class Shard:
    """One device's data."""

    name: str
    tier: str
    data: Path
    samples: int


@dataclass(frozen=True)
class DeviceFigures:
    """What one device said and did; the peaks are the worst of all rounds."""

    name: str
    tier: str
    available_bytes: int
    budget_bytes: int
    blocks: str
    predicted_peak_bytes: int
    measured_peak_bytes: int
    samples: int
    seconds: float
    updates: int


@dataclass
class Federation:
    """What came of a federation.

    Attributes:
        accuracies: after every round.
        losses: the same.
        updates: the events of accepted updates.
        peak_rss_bytes: VmHWM of the coordinator and of every agent, without their children.
    """

    accuracies: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    updates: list[dict[str, Any]] = field(default_factory=list)
    peak_rss_bytes: dict[str, int] = field(default_factory=dict)
    devices: list[DeviceFigures] = field(default_factory=list)
    onnx_path: str = ""
    parity_max_abs: float = 0.0
    parity_samples: int = 0
    idle_agent_rss_bytes: int = 0
    bytes_moved: int = 0


async def run_federation(
    folder: Path,
    job: Path,
    shards: Sequence[Shard],
    caps: Mapping[str, int],
    console: Console,
    *,
    agent_options: Sequence[str] = AGENT_OPTIONS,
    time_limit_s: float = TIME_LIMIT_S,
) -> Federation:
    """Starts coordinator and agents, prints what happens, and returns when the job is done.

    Args:
        caps: per tier, what training may add; 0 for no cap.

    Raises:
        ChildError: a process ended before its time, or the job took longer than `time_limit_s`.
    """
    with lab(folder) as running:
        running.start_coordinator(job, "--exit-when-done")
        console.print(f"coordinator listens on {running.address}; logs in {running.folder / 'logs'}", markup=False)
        for shard in shards:
            running.start_agent(LabDevice(shard.name, shard.data, caps[shard.tier]), *agent_options)
            console.print(f"  {shard.name}: {shard.samples} images, {describe_cap(caps[shard.tier])} for training")
        console.print(
            "agents measure this machine at their first start on it, which takes one or two minutes; then they train"
        )
        try:
            events, peaks = await asyncio.wait_for(_watch(running, console), time_limit_s)
        except asyncio.TimeoutError:
            raise ChildError(f"the job took longer than {time_limit_s:.0f} s; see {running.folder / 'logs'}") from None
        idle = [status_bytes(running.processes[shard.name].pid, "VmRSS") for shard in shards]
        return _figures(events, peaks, shards, running, max(idle))


async def _watch(running: Lab, console: Console) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Prints and collects events until the job is finished; with the VmHWM of every process as of the last event."""
    events: list[dict[str, Any]] = []
    peaks: dict[str, int] = {}
    said: dict[str, str] = {}  # the last line of every device: progress is told every second
    async with open_channel(running.address, running.certificates.operator) as channel:
        stub = FederationStub(channel)
        try:
            async for message in stub.Watch(WatchRequest()):
                event = json.loads(message.json)
                events.append(event)
                for name, process in running.processes.items():
                    peaks[name] = max(peaks.get(name, 0), status_bytes(process.pid, "VmHWM"))
                line = _line(event)
                if line and line != said.get(event.get("device", "")):
                    console.print(line)
                    said[event.get("device", "")] = line
                if event["event"] == "finished":
                    return events, peaks
        except grpc.aio.AioRpcError as error:
            raise ChildError(
                f"the coordinator is gone ({error.code().name}); see {running.log('coordinator')}"
            ) from None
    raise ChildError(f"the coordinator ended the watch before the job was done; see {running.log('coordinator')}")


def _line(event: Mapping[str, Any]) -> str:
    """One event for people; empty for those that would only flood the screen."""
    match event["event"]:
        case "round_started":
            return f"round {event['round']}"
        case "task_given":
            predicted, budget = format_size(event["predicted_peak"]), format_size(event["budget"])
            return f"  {event['device']:<10} plan {event['blocks']:<24} predicted {predicted:>10} of {budget}"
        case "progress" if event["stage_count"] and event["epoch"] == 0:
            return f"  {event['device']:<10} trains units {event['first']}-{event['last']}"
        case "update_accepted":
            peak = max(stage["measured_peak_bytes"] for stage in event["stages"])
            size, seconds = format_size(event["bytes"]), event["seconds"]
            return f"  {event['device']:<10} update of {size} accepted after {seconds:.1f} s, peak {format_size(peak)}"
        case "update_refused" | "task_failed":
            return f"  {event['device']:<10} [red]{event['event']}[/red]: {escape(event['message'])}"
        case "evaluated":
            return f"round {event['round']}: accuracy [bold]{event['accuracy']:.1%}[/bold], loss {event['loss']:.3f}"
        case "exported":
            return f"exported {escape(event['path'])}, parity {event['parity_max_abs']:.1e}"
        case "log":
            return f"  {escape(event['message'])}"
    return ""


def _figures(
    events: list[dict[str, Any]], peaks: dict[str, int], shards: Sequence[Shard], running: Lab, idle: int
) -> Federation:
    federation = Federation(idle_agent_rss_bytes=idle, peak_rss_bytes=peaks)
    exports = [event for event in events if event["event"] == "exported"]
    if exports:
        federation.onnx_path = exports[-1]["path"]
        federation.parity_max_abs = exports[-1]["parity_max_abs"]
        federation.parity_samples = exports[-1]["samples"]
    federation.accuracies = [event["accuracy"] for event in events if event["event"] == "evaluated" and event["round"]]
    federation.losses = [event["loss"] for event in events if event["event"] == "evaluated"]
    federation.updates = accepted = [event for event in events if event["event"] == "update_accepted"]
    given = [event for event in events if event["event"] == "task_given"]
    federation.bytes_moved = sum(e["bytes"] for e in accepted) + sum(e["weights_bytes"] for e in given)
    reports = {event["device"]: event for event in given}
    for shard in shards:
        mine = [event for event in accepted if event["device"] == shard.name]
        stages = [stage for event in mine for stage in event["stages"]]
        federation.devices.append(
            DeviceFigures(
                name=shard.name,
                tier=shard.tier,
                available_bytes=reports[shard.name]["available"],
                budget_bytes=min(stage["budget_bytes"] for stage in stages),
                blocks=reports[shard.name]["blocks"],
                predicted_peak_bytes=max(stage["predicted_peak_bytes"] for stage in stages),
                measured_peak_bytes=max(stage["measured_peak_bytes"] for stage in stages),
                samples=shard.samples,
                seconds=sum(event["seconds"] for event in mine),
                updates=len(mine),
            )
        )
    return federation
