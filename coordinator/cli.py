"""The command `fedepth-coordinator`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import grpc
import msgspec
import typer
from fedepth_wire.channel import broken_handshake, open_channel, plainly, unresolved
from fedepth_wire.tls import INSECURE, Identity, Insecure
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationStub
from rich.table import Table
from rich.text import Text

from coordinator.observe.words import in_words
from coordinator.security import commands as security
from coordinator.security.commands import CertsOption, InsecureOption
from fedepth.address import DEFAULT_PORT, MOST_PORT, parse_address
from fedepth.commands import AddressOption, JsonLogsOption, JsonOption, command_line, examples
from fedepth.errors import ConfigError, FedepthError, ProtocolError, StateError, TransportError, TrustError
from fedepth.files import NOT_JSON, disk_errors, not_writable
from fedepth.job_sections import HIGHEST_OPSET, LOWEST_OPSET, MOST_ROUNDS
from fedepth.printable import as_typed, printable, quoted, shortened
from fedepth.program import run_program
from fedepth.sizes import format_size
from fedepth.terminal import ascii_json, console, print_json

CALL_S = 10.0
_HERE = f"127.0.0.1:{DEFAULT_PORT}"
_STAGE_FIELDS = ("first", "last", "predicted_peak_bytes", "measured_peak_bytes", "budget_bytes")

app = command_line("fedepth-coordinator", "Run and monitor a federated training job.")
app.add_typer(security.app, name="certs")
app.command("enroll", epilog=examples("fedepth-coordinator enroll kitchen"))(security.enroll_command)


class Precision(str, Enum):
    """Of an export's numbers."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


StateOption = Annotated[Path, typer.Option("--state", help="Folder of the job's durable state.")]
DatabaseOption = Annotated[
    str,
    typer.Option(
        "--database",
        envvar="FEDEPTH_DATABASE",
        show_default=False,
        help="postgresql:// URL of the job's record; default: SQLite in --state.",
    ),
]
FilesOption = Annotated[
    str,
    typer.Option(
        "--files",
        envvar="FEDEPTH_FILES",
        show_default=False,
        help="s3:// URL of the job's files; default: --state.",
    ),
]
ConfigOption = Annotated[Path, typer.Option("--config", help="The job file.")]
OperatorOption = Annotated[
    Path | None,
    typer.Option(
        "--certs",
        envvar="FEDEPTH_CERTS",
        show_default=False,
        help="Folder of the certificates, or an operator's bundle; default: the user's folder, in ~/.local/state.",
    ),
]


@app.command(
    "serve",
    epilog=examples("fedepth-coordinator serve --config job.toml --state runs/job --exit-when-done"),
)
def serve_command(
    config: ConfigOption,
    state: StateOption,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=MOST_PORT, help="Port; 0 lets the system choose.")] = DEFAULT_PORT,
    port_file: Annotated[Path | None, typer.Option(help="File to write the port to once serving.")] = None,
    exit_when_done: Annotated[bool, typer.Option("--exit-when-done", help="Exit after the last round.")] = False,
    json_logs: JsonLogsOption = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on with another learning rate or rule; see docs/state.md.")
    ] = False,
    database: DatabaseOption = "",
    files: FilesOption = "",
    certs: CertsOption = None,
    enroll_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MOST_PORT,
            show_default=False,
            help="Port at which devices enrol; default: the one after --port.",
        ),
    ] = None,
    no_enroll: Annotated[bool, typer.Option("--no-enroll", help="Enrol no devices.")] = False,
    insecure: InsecureOption = False,
) -> None:
    """Serve a job to devices. To resume after a stop or a crash, run it again with the same --state."""
    from coordinator.front import ServeOptions
    from coordinator.model_worker.client import ModelWorker
    from coordinator.observe.logs import renderer
    from coordinator.server import refused, serve
    from coordinator.start_checks import examine
    from fedepth.heap import share_one_arena
    from fedepth.job import read_job
    from fedepth.logs import configure_logs

    share_one_arena()
    configure_logs(renderer(json_logs))
    for unused, given in (("--no-enroll", no_enroll), ("--insecure", insecure)):
        if given and enroll_port is not None:
            raise ConfigError(f"--enroll-port: with {unused} nobody can enrol; leave one of them out")
    if enroll_port is None and not (no_enroll or insecure):
        if port == MOST_PORT:
            raise ConfigError(f"no port comes after --port {port} at which devices could enrol; give --enroll-port")
        enroll_port = port and port + 1  # of any free port, another one
    options = ServeOptions(
        state,
        host,
        port,
        port_file,
        exit_when_done,
        database,
        files,
        accept_changes,
        certificates=INSECURE if insecure else security.certificates_in(certs),
        enroll_port=None if no_enroll else enroll_port,
    )
    try:
        job, missing = read_job(config)
    except ConfigError as error:
        raise refused(error, options) from None

    async def run() -> None:
        await serve(job, options, ModelWorker(), examine, missing)

    asyncio.run(run())


@app.command("status", epilog=examples("fedepth-coordinator status --coordinator 127.0.0.1:8970 --json"))
def status_command(
    coordinator: AddressOption = _HERE,
    as_json: JsonOption = False,
    certs: OperatorOption = None,
    insecure: InsecureOption = False,
) -> None:
    """Show the status of a running job."""
    reply = asyncio.run(_status(str(parse_address(coordinator)), security.operator(certs, insecure)))
    fields = {field.name: getattr(reply, field.name) for field in pb.JobStatusReply.DESCRIPTOR.fields}
    if as_json:
        print_json(fields)
        return
    accuracy = f"{reply.accuracy:.2%}" if reply.accuracy >= 0 else "unknown"
    onnx = reply.onnx_path or "not exported yet"
    print(printable(f"{reply.job}: round {reply.round} of {reply.rounds}, {reply.phase}, {reply.devices} devices"))
    weights = reply.weights_digest[:12] or "not there yet"
    print(printable(f"accuracy {accuracy}, weights {weights}, ONNX {onnx}"))
    if reply.epsilon > 0:
        print(f"privacy spent: epsilon {reply.epsilon:.3g} with delta {reply.delta:g}")
    if reply.not_private:
        print(printable(reply.not_private))
    if reply.unpublished:
        print(f"rounds that were not published: {reply.unpublished}; see fedepth-coordinator record")
    if reply.message:
        print(printable(reply.message))


@app.command(
    "export",
    epilog=examples("fedepth-coordinator export --state runs/job --config job.toml --round 3 --output m.onnx"),
)
def export_command(
    state: StateOption,
    config: ConfigOption,
    output: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    round_number: Annotated[
        int | None, typer.Option("--round", min=0, max=MOST_ROUNDS, help="Round; default: the latest.")
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option(
            min=LOWEST_OPSET, max=HIGHEST_OPSET, help="ONNX operator set; default: the lowest that is needed."
        ),
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Of weights and most operators. Input and output are float32.")
    ] = None,
    preprocessing: Annotated[
        bool | None,
        typer.Option(
            "--preprocessing/--no-preprocessing", help="Take bytes (uint8, 0..255) and normalise in the file."
        ),
    ] = None,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
    files: FilesOption = "",
) -> None:
    """Export a round's weights to ONNX and compare the outputs with torch's. No running coordinator is needed.

    --opset, --precision and --preprocessing override [export] in the job file.
    """
    from fedepth.job import load_config, with_export

    chosen = precision.value if precision else None
    job = with_export(load_config(config), opset=opset, precision=chosen, preprocessing=preprocessing)
    answer = asyncio.run(_export(job, state, round_number, output, database, files))
    if as_json:
        print_json(answer)
        return
    print(
        f"{printable(answer['path'])}: {answer['size_bytes']} bytes, opset {answer['opset']}, IR version "
        f"{answer['ir_version']}, {answer['precision']}; classes in {printable(answer['labels_path'])}"
    )
    ties = f", {answer['ties']} too close to tell" if answer["ties"] else ""
    print(
        f"compared on {printable(answer['compared_on'])}: largest difference {answer['parity_max_abs']:.1e}, same top "
        f"answer for {answer['top1_equal']} of {answer['samples']}{ties}"
    )


@app.command("watch", epilog=examples("fedepth-coordinator watch --coordinator 127.0.0.1:8970"))
def watch_command(
    coordinator: AddressOption = _HERE,
    as_json: JsonOption = False,
    certs: OperatorOption = None,
    insecure: InsecureOption = False,
) -> None:
    """Print what happens in a running job, line by line, until it stops."""
    out = console(soft_wrap=True)
    address, identity = str(parse_address(coordinator)), security.operator(certs, insecure)

    async def run() -> None:
        async for line in _watch(address, identity):
            if as_json:
                print(ascii_json(line), flush=True)
            else:
                event = _event(line)
                out.print(_at(event) + describe(event), markup=False)

    asyncio.run(run())


@app.command("record", epilog=examples("fedepth-coordinator record --state runs/job --json"))
def record_command(
    state: StateOption, as_json: JsonOption = False, database: DatabaseOption = "", files: FilesOption = ""
) -> None:
    """Show rounds, accuracy, and the predicted and measured memory of every stage on every device."""
    record = read_record(state, database, files)
    if as_json:
        print_json(record)
    else:
        out = console()
        for table in _tables(record):
            out.print(table)


@app.command("backup", epilog=examples("fedepth-coordinator backup --state runs/job --output backups/job-1"))
def backup_command(
    state: StateOption,
    output: Annotated[Path, typer.Option(help="Folder to write the copy to; it must be empty or missing.")],
    as_json: JsonOption = False,
    database: DatabaseOption = "",
    files: FilesOption = "",
) -> None:
    """Copy what a job needs to go on: its record, the weights in force, waiting updates. The job may be running."""
    from coordinator.store.records import Store

    store = Store.read(state, database=database, files=files)
    try:
        made = store.backup(output)
    finally:
        store.close()
    if as_json:
        print_json({"output": str(output), **vars(made)})
        return
    print(
        f"{printable(str(output))}: job {printable(made.job)} after round {made.round}, {made.updates} updates of the "
        f"next, files of {format_size(made.size_bytes)}"
    )
    if made.has_record:
        print(f"to go on from it: fedepth-coordinator serve --state {as_typed(str(output))} --config JOB.toml")
    else:
        print("the record is not in it: copy the database with pg_dump now, before another round closes")


@app.command("rollback", epilog=examples("fedepth-coordinator rollback --state runs/job --round 3"))
def rollback_command(
    state: StateOption,
    round_number: Annotated[
        int, typer.Option("--round", min=0, max=MOST_ROUNDS, help="Round whose weights are in force again.")
    ],
    as_json: JsonOption = False,
    database: DatabaseOption = "",
    files: FilesOption = "",
) -> None:
    """Take back all rounds after one, and end a pause. The coordinator must be stopped."""
    from coordinator.store.records import Store

    store = Store.open_to_repair(state, database=database, files=files)
    try:
        record = store.rollback(round_number)
    finally:
        store.close()
    if as_json:
        print_json(record)
        return
    print(f"round {record.round} is the last one again, with weights {record.digest[:12]}; serve to go on from there")


def read_record(state: Path, database: str = "", files: str = "") -> dict[str, Any]:
    """The record of a job: "job", "not_private" (see `Summary`), "rounds", "superseded", "updates" (as far as they are
    kept), "failures", "changes" of the job file.

    Raises:
        StateError: the directory holds no job.
    """
    from coordinator.store.records import Store

    store = Store.read(state, database=database, files=files)
    try:
        names = store.device_names()
        updates = store.updates()
        return {
            "job": store.job_name,
            "not_private": store.not_private(),
            "rounds": store.rounds(),
            "superseded": store.superseded_rounds(),
            "updates": [{"device": names.get(each.device_id, each.device_id), "result": each} for each in updates],
            "failures": store.failure_counts(),
            "changes": store.changes(),
        }
    finally:
        store.close()


def describe(event: dict[str, Any]) -> str:
    """An event for people: a sentence, or name and fields where there is none; stages in lines of their own."""
    stages = event.pop("stages", [])
    text = in_words(event)
    if text is None:
        name = event.pop("event", "?")
        event.pop("time", None)
        fields = printable(" ".join(f"{key}={value}" for key, value in event.items()))
        text = f"{printable(str(name)):<16} {fields}"
    for stage in stages:
        text += (
            f"\n    units {stage['first']}-{stage['last']}: predicted {format_size(stage['predicted_peak_bytes'])}, "
            f"measured {format_size(stage['measured_peak_bytes'])}, budget {format_size(stage['budget_bytes'])}"
        )
        if stage.get("models", 1) > 1:
            text += f", {stage['models']} models"
    return text


def _at(event: dict[str, Any]) -> str:
    """When an event happened, as in the log."""
    try:
        return datetime.fromtimestamp(event["time"], timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ ")
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return ""


def main() -> None:
    """Runs a command and ends; see `fedepth.program`."""
    run_program("fedepth-coordinator", app)


async def _status(address: str, identity: Identity | Insecure) -> pb.JobStatusReply:
    async with open_channel(address, identity) as channel:
        try:
            return await FederationStub(channel).JobStatus(pb.JobStatusRequest(), timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            raise _unreachable(address, identity, error) from None


async def _watch(address: str, identity: Identity | Insecure) -> AsyncIterator[str]:
    async with open_channel(address, identity) as channel:
        try:
            async for event in FederationStub(channel).Watch(pb.WatchRequest()):
                yield event.json
        except grpc.aio.AioRpcError as error:
            raise _unreachable(address, identity, error) from None


def _event(line: str) -> dict[str, Any]:
    try:
        event = msgspec.json.decode(line, type=dict[str, Any])
        stages = [
            {"models": int(stage.get("models", 1)), **{key: int(stage[key]) for key in _STAGE_FIELDS}}
            for stage in msgspec.convert(event.get("stages", []), list[dict[str, Any]])
        ]
        return event | {"stages": stages}
    except (*NOT_JSON, KeyError, TypeError, ValueError, OverflowError):
        raise ProtocolError(f"the coordinator sent an event that cannot be shown: {quoted(line)}") from None


def _unreachable(address: str, identity: Identity | Insecure, error: grpc.aio.AioRpcError) -> FedepthError:
    details = printable(error.details() or "")
    if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return TrustError(f"the coordinator at {address} refuses: {details}")
    if why := broken_handshake(details, identity):
        return TrustError(f"no answer from a coordinator at {address}: {why}")
    if unresolved(details):
        return TransportError(
            f"no answer from a coordinator at {address}: this machine cannot resolve that name; check it with "
            f"`getent hosts {parse_address(address).host}`, or give the IP address"
        )
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return TransportError(f"the coordinator at {address} answers, and is {details}")
    why = plainly(error.code(), details)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:  # somebody listens
        return TransportError(
            f"no answer from a coordinator at {address} ({why}); it may be preparing its model still, as its log says"
        )
    return TransportError(f"no answer from a coordinator at {address} ({why}); is it running there?")


async def _export(
    config: Any, state: Path, round_number: int | None, output: Path, database: str, files: str
) -> dict[str, Any]:
    from coordinator.evaluations import export_fields
    from coordinator.model_worker.client import ModelWorker
    from coordinator.store.files import LABELS
    from coordinator.store.records import Store
    from fedepth.job_changes import refusal, settings_of
    from fedepth.job_rows import with_statistics

    store = Store.read(state, database=database, files=files)
    models = ModelWorker()
    try:
        kept = store.kept_rounds()
        if not kept:
            raise StateError(f"{state} holds no weights yet; start the coordinator on it first")
        changed = [each for each in store.changed(settings_of(config)) if each.setting.startswith("model.")]
        refused = refusal(changed, str(store.directory), accept=True)
        if refused:
            raise StateError(refused)
        config = with_statistics(config, store.statistics())
        wanted = kept[-1] if round_number is None else store.kept_round(round_number)
        if output.is_dir() or not output.name or output.name == Path(LABELS).name:
            raise ConfigError(f"--output: {printable(str(output))} is not the name of an ONNX file; write MODEL.onnx")
        with disk_errors("the export cannot be written", output):
            output.parent.mkdir(parents=True, exist_ok=True)
        why = not_writable(output)
        if why:
            raise ConfigError(f"--output: {why}")
        return await models.request("export", **export_fields(config, store, wanted, str(output)))
    finally:
        await models.stop()
        store.close()


def _tables(record: dict[str, Any]) -> list[Table]:
    finished = (*record["superseded"], *record["rounds"])
    private = bool(record["not_private"]) or any(done.epsilon is not None for done in finished)
    columns = ("round", "devices", "samples", "accuracy", "loss", *(("epsilon",) if private else ()), "ONNX")
    overview = Table(*columns, title=_plain(record["job"]), caption=_plain(record["not_private"]) or None)
    for done in finished:
        overview.add_row(
            f"{done.round} (taken back)" if done.superseded else str(done.round),
            str(done.devices),
            str(done.samples),
            "" if done.accuracy is None else f"{done.accuracy:.2%}",
            "" if done.loss is None else f"{done.loss:.4f}",
            *(("" if done.epsilon is None else f"{done.epsilon:.3g}",) if private else ()),
            _plain(done.export_path if done.published else f"not published: {done.note}"),
        )
    columns = (
        "round",
        "device",
        "units",
        "models",
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
                _plain(update["device"]),
                f"{stage.first}-{stage.last}",
                str(stage.models),
                str(stage.micro_batch),
                format_size(stage.predicted_peak_bytes),
                format_size(stage.rehearsed_peak_bytes),
                format_size(stage.measured_peak_bytes),
                format_size(stage.budget_bytes),
                f"{stage.loss_first:.3f} → {stage.loss_last:.3f}",
                f"{stage.seconds:.1f}",
            )
    changes = Table("from round", "setting", "before", "now", title="changes of the job file")
    for change in record["changes"]:
        before, now = (_plain(shortened(msgspec.json.encode(value).decode())) for value in (change.before, change.now))
        changes.add_row(str(change.round), _plain(change.setting), before, now)
    failures = Table("what", "times", title="failures and refusals")
    for what, times in record["failures"].items():
        failures.add_row(_plain(what), str(times))
    return [overview, stages, *([changes] if record["changes"] else []), failures]


def _plain(text: str) -> Text:
    """For a table, which would take [red] in a name for markup."""
    return Text(printable(text))
