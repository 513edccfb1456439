"""A small federation of real processes that a harness keeps alive, as systemd would, while faults hit them."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import msgspec
import psutil
from fedepth_wire.tls import COORDINATOR_NAME, channel_credentials
from fedepth_wire.v1 import federation_pb2 as pb
from fedepth_wire.v1.federation_pb2_grpc import FederationStub

from benchmarks.certificates import LabCertificates
from benchmarks.faults.injection import Action, Calls, Control, Rule, environment
from benchmarks.faults.outside import Outside
from benchmarks.faults.workplace import JOB, Workplace, free_port
from benchmarks.lab import program
from coordinator.cli import read_record
from fedepth.errors import ChildError

DEVICES = 3
FAKE_TRAINER = "benchmarks.faults.trainer"
REMOVALS = 7  # a rule that only observes: what leaves an outbox
START_S = 60.0
LOOK_S = 0.03
RESTART_S = 0.3  # RestartSec
USUAL = {"rounds": 10, "rate": 0.05, "epochs": 1, "export": 0, "quorum": 2, "deadline": 8}
RETENTION = "[retention]\nkeep_last = 100000\nhistory = 100000\n"  # the judge looks at all rounds
AGENT = '[retry]\nfirst_s = 0.2\nlongest_s = 1\n[trainer]\nlinger_s = 600\nthreads = 1\nallocator = "glibc"\n'


@dataclass(frozen=True)
class Exit:
    """A process that has ended."""

    name: str
    status: int
    at: float
    said: str  # the end of its log


@dataclass
class Managed:
    """A program that is kept running.

    Attributes:
        held: it is not started again for now.
        stderr: an open descriptor in place of its log file, such as of a pipe; -1 for the log file.
    """

    name: str
    argv: list[str]
    control: Control
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    held: bool = False
    ended_at: float = 0.0
    stderr: int = -1
    exits: list[Exit] = field(default_factory=list)


class Federation:
    """A coordinator and its devices in one folder. Close it in the end.

    Attributes:
        managed: its programs, by name: "coordinator", "device-0", and so on.
        finished: the coordinator has ended by itself, with status 0.
    """

    def __init__(
        self,
        place: Workplace,
        folder: Path,
        *,
        rounds: int,
        job: Mapping[str, Any] | None = None,
        real_trainers: bool = False,
        devices: int = DEVICES,
        outside: Outside | None = None,
    ) -> None:
        folder.mkdir(parents=True)
        self.outside = outside or Outside()
        self.outside.prepare(folder)
        self.place, self.folder, self.real_trainers = place, folder, real_trainers
        self.state, self.archive = folder / "coordinator", folder / "archive"
        self.archive.mkdir()
        self.port = free_port()
        self.job = folder / "job.toml"
        self.write_job(rounds=rounds, **(job or {}))
        if self.outside.is_template and not (job or {}).get("model_section"):
            shutil.copytree(place.template, self.state, dirs_exist_ok=True)
        (folder / "agent.toml").write_text(AGENT)
        self.managed: dict[str, Managed] = {}
        self.finished = False
        self._closed = False
        self._stop = threading.Event()
        self._lock = threading.RLock()
        self._links: set[tuple[int, int]] = set()
        self.certificates = LabCertificates(folder / "certificates")
        self._channel = grpc.secure_channel(
            f"127.0.0.1:{self.port}",
            channel_credentials(self.certificates.operator),
            options=[("grpc.enable_http_proxy", 0), ("grpc.ssl_target_name_override", COORDINATOR_NAME)],
        )
        self._stub = FederationStub(self._channel)
        self._add("coordinator", [program("fedepth-coordinator"), *self._serve()], "")
        for number in range(devices):
            self.add_device(f"device-{number}", number)
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    def write_job(self, **changes: Any) -> None:
        """Writes the job file anew."""
        fields: dict[str, Any] = {**USUAL, "extra": RETENTION}
        self.job.write_text(JOB.format(**{**fields, **changes}, test=self.place.test_data))

    def add_device(self, name: str, shard: int) -> None:
        """Another device; it is started with the others, or at once if they run."""
        argv = [
            *(program("fedepth-client"), "run", "--coordinator", f"127.0.0.1:{self.port}"),
            *("--config", str(self.folder / "agent.toml"), "--data", str(self.place.shards[shard])),
            *("--state", str(self.certificates.enroll(name, self.folder / name)), "--name", name),
            *("--json-logs", "--exit-when-done"),
        ]
        self._add(name, argv, "" if self.real_trainers else FAKE_TRAINER)

    def _serve(self) -> list[str]:
        return [
            *("serve", "--config", str(self.job), "--state", str(self.state), "--port", str(self.port)),
            *("--port-file", str(self.folder / "port"), "--json-logs", "--exit-when-done"),
            *self.certificates.serve_options(),
            *(("--database", self.outside.database) if self.outside.database else ()),
            *(("--files", self.outside.files) if self.outside.files else ()),
        ]

    def _add(self, name: str, argv: list[str], trainer: str) -> None:
        control = Control(self.folder / f"{name}.control")
        control.arm(REMOVALS, Rule(Calls.RENAME, "*/outbox/.done-*", Action.OBSERVE, count=0))
        variables = {
            **os.environ,
            **environment(self.place.shim, control, self.journal(name), trainer),
            **self.outside.variables,
            "PYTHONUNBUFFERED": "1",
            "XDG_CACHE_HOME": str(self.place.folder / "cache"),
            "FAULTS_TRAININGS": str(self.folder / f"{name}.trainings"),
            "FAULTS_ARCHIVE": str(self.archive),
            "FAULTS_SCENE": str(self.folder / f"{name}.scene"),
        }
        self.managed[name] = Managed(name, argv, control, variables)

    # --- what is looked at

    def journal(self, name: str) -> Path:
        """What a program wrote to standard error, and what was done to it."""
        return self.folder / f"{name}.journal"

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    @property
    def devices(self) -> list[str]:
        return [name for name in self.managed if name != "coordinator"]

    def status(self) -> pb.JobStatusReply | None:
        """The job as its coordinator sees it; None if it does not answer."""
        try:
            return self._stub.JobStatus(pb.JobStatusRequest(), timeout=2.0)
        except grpc.RpcError:
            return None

    def round(self) -> int:
        """The round in work; -1 if nobody answers."""
        found = self.status()
        return -1 if found is None else found.round

    def pid(self, name: str) -> int:
        """0 if it does not run."""
        process = self.managed[name].process
        return 0 if process is None or process.poll() is not None else process.pid

    def child(self, name: str, command: str) -> int:
        """A child of a program with this in its command line; 0 if there is none."""
        pid = self.pid(name)
        for found in psutil.Process(pid).children() if pid else ():
            with contextlib.suppress(psutil.Error):
                if command in " ".join(found.cmdline()):
                    return found.pid
        return 0

    def record(self) -> dict[str, Any]:
        """What `fedepth-coordinator record --json` says.

        Raises:
            FedepthError: it cannot be read.
        """
        found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(read_record(self.state, self.outside.database)))
        return found

    # --- what is done

    def start(self) -> None:
        """Starts every program, and keeps it running from now on."""
        self._launch(self.managed["coordinator"])
        self.wait_until(lambda: self.round() >= 0, START_S, "the coordinator does not serve")
        for name in self.devices:
            self._launch(self.managed[name])
        self._keeper.start()

    def hold(self, name: str) -> None:
        """From now on its end is final, until `release`."""
        with self._lock:
            self.managed[name].held = True

    def release(self, name: str) -> None:
        with self._lock:
            self.managed[name].held = False

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> bool:
        """Sends a signal; False if it does not run."""
        pid = self.pid(name)
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
        return bool(pid)

    def end(self, name: str) -> None:
        """Ends a program in order, and holds it."""
        self.hold(name)
        self.kill(name, signal.SIGTERM)
        process = self.managed[name].process
        if process is not None:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._note_exit(self.managed[name])

    def play(self, name: str, scene: str) -> None:
        """How the fake trainer of a device behaves from now on; "" for well."""
        path = self.folder / f"{name}.scene"
        if scene:
            path.with_suffix(".new").write_text(json.dumps({"do": scene}))
            path.with_suffix(".new").replace(path)
        else:
            path.unlink(missing_ok=True)

    def replace_trainer(self, name: str) -> None:
        """From its next start on, this device has the trainer that trains nothing."""
        managed = self.managed[name]
        managed.environment = {**managed.environment, "FAULTS_TRAINER": FAKE_TRAINER}

    def wait_until(self, true: Any, limit_s: float, otherwise: str) -> None:
        """Waits for a condition.

        Raises:
            ChildError: it did not come true in time.
        """
        end = time.monotonic() + limit_s
        while not true():
            if time.monotonic() > end:
                raise ChildError(f"{otherwise} after {format_seconds(limit_s)}")
            time.sleep(0.05)

    def wait_rounds(self, number: int, limit_s: float) -> None:
        """Waits until this round is over.

        Raises:
            ChildError: it is not in time.
        """
        seen = [-1]

        def over() -> bool:
            status = self.status()
            seen[0] = status.round if status else seen[0]
            return self.finished or (status is not None and (status.round > number or status.phase == "finished"))

        try:
            self.wait_until(over, limit_s, "")
        except ChildError:
            status = self.status()
            where = f"round {status.round}, {status.phase}" if status else f"no answer; last round {seen[0]}"
            raise ChildError(f"round {number} is not over after {format_seconds(limit_s)}: {where}") from None

    def close(self) -> None:
        """Ends every program."""
        self._stop.set()
        if self._closed:
            return
        self._closed = True
        if self._keeper.is_alive():
            self._keeper.join()
        for name in self.managed:
            self.kill(name, signal.SIGCONT)
            self.kill(name)
            process = self.managed[name].process
            if process is not None:
                process.wait()
            self.managed[name].control.close()
        self._channel.close()
        self.outside.close()

    def _keep(self) -> None:
        while not self._stop.wait(LOOK_S):
            with self._lock:
                self._link_files()
                for each in list(self.managed.values()):
                    self._look_after(each)

    def _look_after(self, each: Managed) -> None:
        if each.process is not None and each.process.poll() is not None:
            self._note_exit(each)
        if each.process is None and not each.held and not self.finished and time.monotonic() >= each.ended_at:
            self._launch(each)

    def _note_exit(self, each: Managed) -> None:
        if each.process is None:
            return
        status = each.process.returncode
        each.exits.append(Exit(each.name, status, time.time(), self._end_of_log(each.name)))
        each.process = None
        quick = len([past for past in each.exits if time.time() - past.at < 10])
        each.ended_at = time.monotonic() + (RESTART_S if quick < 5 else 2.0)
        if each.name == "coordinator" and status == 0 and not each.held:
            self.finished = True
        elif status == 0:
            each.held = True  # the job is done, as far as it knows

    def _end_of_log(self, name: str) -> str:
        path = self.journal(name)
        return path.read_text(errors="replace")[-600:] if path.exists() else ""

    def _launch(self, each: Managed) -> None:
        with open(self.log(each.name), "ab") as log:
            to = log if each.stderr < 0 else each.stderr
            each.process = subprocess.Popen(
                each.argv, stdin=subprocess.DEVNULL, stdout=to, stderr=to, start_new_session=True, env=each.environment
            )

    def _link_files(self) -> None:
        """Keeps every part and every weights file, since both go as rounds pass: by a link, or as a copy where they lie
        on another disk, which may give their numbers to other files."""
        for path in _sealed_files(self.state):
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                found = path.stat()
                key = (found.st_ino, found.st_mtime_ns)
                if key not in self._links:
                    self._links.add(key)
                    kept = self.archive / f"{found.st_ino}-{found.st_mtime_ns}-{path.name}"
                    if found.st_dev == self.archive.stat().st_dev:
                        os.link(path, kept)
                    else:
                        shutil.copyfile(path, kept)


def _sealed_files(state: Path) -> Iterator[Path]:
    for pattern in ("weights/round-*.safetensors", "spool/*/part-*.safetensors"):
        yield from map(Path, glob.glob(f"{state}/{pattern}"))  # noqa: PTH207 - Path.glob fails where folders vanish


def format_seconds(seconds: float) -> str:
    return f"{seconds:.0f} s"
