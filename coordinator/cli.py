"""The command `fedepth-coordinator`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import grpc
import msgspec
import typer
from fedepth_wire.channel import open_channel
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationStub
from rich.console import Console
from rich.table import Table

from fedepth.errors import FedepthError, StateError, TransportError
from fedepth.sizes import format_size

CALL_S = 10.0

app = typer.Typer(
    name="fedepth-coordinator",
    help="Run and monitor a federated training job.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

StateOption = Annotated[Path, typer.Option("--state", help="Folder of the job's durable state.", file_okay=False)]
ConfigOption = Annotated[Path, typer.Option("--config", help="The job file.")]
AddressOption = Annotated[str, typer.Option("--coordinator", help="HOST:PORT of a running coordinator.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(
    "serve",
    epilog="Example: fedepth-coordinator serve --config job.toml --state runs/job --exit-when-done",
)
def serve_command(
    config: ConfigOption,
    state: StateOption,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 lets the system choose.")] = 8970,
    port_file: Annotated[Path | None, typer.Option(help="File to write the port to once serving.")] = None,
    exit_when_done: Annotated[bool, typer.Option("--exit-when-done", help="Exit after the last round.")] = False,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Log JSON lines.")] = False,
) -> None:
    """Serve a job to devices. To resume after a stop or a crash, run it again with the same --state."""
    from coordinator.model_worker.client import ModelWorker
    from coordinator.observe.logs import renderer
    from coordinator.server import ServeOptions, serve
    from fedepth.job import load_config
    from fedepth.logs import configure_logs

    configure_logs(renderer(json_logs))
    options = ServeOptions(state, host, port, port_file, exit_when_done)

    async def run() -> None:
        await serve(load_config(config), options, ModelWorker())

    asyncio.run(run())


@app.command("status", epilog="Example: fedepth-coordinator status --coordinator 127.0.0.1:8970 --json")
def status_command(coordinator: AddressOption = "127.0.0.1:8970", as_json: JsonOption = False) -> None:
    """Show the status of a running job."""
    reply = asyncio.run(_status(coordinator))
    fields = {field.name: getattr(reply, field.name) for field in pb.JobStatusReply.DESCRIPTOR.fields}
    if as_json:
        print(json.dumps(fields))
        return
    accuracy = f"{reply.accuracy:.2%}" if reply.accuracy >= 0 else "unknown"
    print(f"{reply.job}: round {reply.round} of {reply.rounds}, {reply.phase}, {reply.devices} devices")
    onnx = reply.onnx_path or "not exported yet"
    print(f"accuracy {accuracy}, weights {reply.weights_digest[:12]}, ONNX {onnx}")


@app.command(
    "export",
    epilog="Example: fedepth-coordinator export --state runs/job --config job.toml --round 3 --output m.onnx",
)
def export_command(
    state: StateOption,
    config: ConfigOption,
    output: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    round_number: Annotated[int | None, typer.Option("--round", min=0, help="Round; default: the latest.")] = None,
) -> None:
    """Export a round's weights to ONNX and compare the outputs with torch's. No running coordinator is needed."""
    from fedepth.job import load_config

    answer = asyncio.run(_export(load_config(config), state, round_number, output))
    print(
        f"{answer['path']}: {answer['size_bytes']} bytes, largest difference {answer['parity_max_abs']:.1e} "
        f"over {answer['samples']} samples, same top answer: {'yes' if answer['top1_equal'] else 'no'}"
    )


@app.command("watch", epilog="Example: fedepth-coordinator watch --coordinator 127.0.0.1:8970")
def watch_command(coordinator: AddressOption = "127.0.0.1:8970", as_json: JsonOption = False) -> None:
    """Print what happens in a running job, line by line, until it stops."""
    console = Console(highlight=False, soft_wrap=True)

    async def run() -> None:
        async for line in _watch(coordinator):
            if as_json:
                print(line, flush=True)
            else:
                console.print(describe(json.loads(line)), markup=False)

    asyncio.run(run())


@app.command("record", epilog="Example: fedepth-coordinator record --state runs/job --json")
def record_command(state: StateOption, as_json: JsonOption = False) -> None:
    """Show rounds, accuracy, and the predicted and measured memory of every stage on every device."""
    record = read_record(state)
    if as_json:
        print(msgspec.json.encode(record).decode())
    else:
        for table in _tables(record):
            Console(width=None if sys.stdout.isatty() else 200).print(table)


def read_record(state: Path) -> dict[str, Any]:
    """The whole record of a job, from its state directory: "job", "rounds", "updates", "failures".

    Raises:
        StateError: the directory holds no job.
    """
    from coordinator.store.records import Store

    store = Store.read(state)
    try:
        names = store.device_names()
        finished = store.rounds()
        last = finished[-1].round + 1 if finished else 0
        updates = [result for number in range(1, last + 1) for result in store.updates_of(number)]
        return {
            "job": store.job_name,
            "rounds": finished,
            "updates": [{"device": names.get(each.device_id, each.device_id), "result": each} for each in updates],
            "failures": store.failure_counts(),
        }
    finally:
        store.close()


def describe(event: dict[str, Any]) -> str:
    """An event in one line for people: its name, then its fields."""
    name = event.pop("event", "?")
    event.pop("time", None)
    stages = event.pop("stages", [])
    text = " ".join(f"{key}={value}" for key, value in event.items())
    for stage in stages:
        text += (
            f"\n    units {stage['first']}-{stage['last']}: predicted {format_size(stage['predicted_peak_bytes'])}, "
            f"measured {format_size(stage['measured_peak_bytes'])}, budget {format_size(stage['budget_bytes'])}"
        )
    return f"{name:<16} {text}"


def main() -> None:
    """Runs a command. Errors of ours end it with their message and status 1."""
    try:
        app()
    except FedepthError as error:
        print(f"fedepth-coordinator: {error}", file=sys.stderr)
        sys.exit(1)


async def _status(address: str) -> pb.JobStatusReply:
    async with open_channel(address) as channel:
        try:
            return await FederationStub(channel).JobStatus(pb.JobStatusRequest(), timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            raise _unreachable(address, error) from None


async def _watch(address: str) -> AsyncIterator[str]:
    async with open_channel(address) as channel:
        try:
            async for event in FederationStub(channel).Watch(pb.WatchRequest()):
                yield event.json
        except grpc.aio.AioRpcError as error:
            raise _unreachable(address, error) from None


def _unreachable(address: str, error: grpc.aio.AioRpcError) -> TransportError:
    return TransportError(
        f"no answer from a coordinator at {address} ({error.code().name}: {error.details()}); is it running there?"
    )


async def _export(config: Any, state: Path, round_number: int | None, output: Path) -> dict[str, Any]:
    from coordinator.global_model import export_fields
    from coordinator.model_worker.client import ModelWorker
    from coordinator.store.records import Store

    store = Store.read(state)
    models = ModelWorker()
    try:
        done = {record.round: record for record in store.rounds()}
        if not done:
            raise StateError(f"{state} holds no weights yet; start the coordinator on it first")
        wanted = max(done) if round_number is None else round_number
        if wanted not in done:
            raise StateError(f"{state} holds rounds 0 to {max(done)}, not {wanted}; choose another --round")
        output.parent.mkdir(parents=True, exist_ok=True)
        return await models.request("export", **export_fields(config, store, done[wanted], str(output)))
    finally:
        await models.stop()
        store.close()


def _tables(record: dict[str, Any]) -> list[Table]:
    overview = Table("round", "devices", "samples", "accuracy", "loss", "ONNX", title=record["job"])
    for done in record["rounds"]:
        known = done.accuracy >= 0
        overview.add_row(
            str(done.round),
            str(done.devices),
            str(done.samples),
            f"{done.accuracy:.2%}" if known else "",
            f"{done.loss:.4f}" if known else "",
            done.export_path,
        )
    columns = (
        "round",
        "device",
        "units",
        "micro-batch",
        "predicted",
        "rehearsed",
        "measured",
        "budget",
        "loss",
        "seconds",
    )
    stages = Table(*columns, title="stages")
    for update in record["updates"]:
        result = update["result"]
        for stage in result.stages:
            stages.add_row(
                str(result.round),
                update["device"],
                f"{stage.first}-{stage.last}",
                str(stage.micro_batch),
                format_size(stage.predicted_peak_bytes),
                format_size(stage.rehearsed_peak_bytes),
                format_size(stage.measured_peak_bytes),
                format_size(stage.budget_bytes),
                f"{stage.loss_first:.3f} → {stage.loss_last:.3f}",
                f"{stage.seconds:.1f}",
            )
    failures = Table("what", "times", title="failures and refusals")
    for what, times in record["failures"].items():
        failures.add_row(what, str(times))
    return [overview, stages, failures]
