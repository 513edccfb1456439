"""Stores of every kind: SQLite or PostgreSQL for the record, the directory or a bucket for the files."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from coordinator.store.database import Database
from coordinator.store.records import RoundRecord, Store, TaskRecord
from coordinator.store.storage import Directory
from fedepth.aggregation.rules import Norms
from fedepth.job import model_spec
from fedepth.task import Result


@dataclass
class Place:
    """Where one test's state lies, and what is often done with it."""

    folder: Path
    kit: Any
    database: str = ""
    files: str = ""

    def open(self) -> Store:
        spec = model_spec(self.kit.config())
        return Store.open(self.folder, "demo", spec, database=self.database, files=self.files)

    def repair(self) -> Store:
        return Store.open_to_repair(self.folder, database=self.database, files=self.files)

    def read(self) -> Store:
        return Store.read(self.folder, database=self.database, files=self.files)

    def partial(self, content: bytes) -> Path:
        """New weights, as an average writes them."""
        path = self.folder / "weights" / "new.partial"
        path.write_bytes(content)
        return path

    def record_of(self, number: int, content: bytes, **changes: Any) -> RoundRecord:
        fields = {"closed_at": 1000.0 + number, "devices": 2, "samples": 40, **changes}
        return RoundRecord(number, self.kit.sha256(content), len(content), **fields)

    def add_round(self, store: Store, number: int, content: bytes = b"", **changes: Any) -> RoundRecord:
        """A published round with these weights, by default with some of its own."""
        content = content or b"weights %d" % number
        store.seal_weights(self.partial(content), number)
        record = self.record_of(number, content, **changes)
        store.record_round(record)
        return record

    def refuse_round(self, store: Store, number: int, content: bytes, note: str = "it is worse") -> RoundRecord:
        """A round whose average is not published."""
        store.seal_weights(self.partial(content), number)
        before = store.latest_round()
        assert before is not None
        aside = self.kit.sha256(content)
        record = replace(before, round=number, published=False, note=note, aside_digest=aside, export_path="")
        store.record_round(record)
        return record

    def task(self, number: int = 1, device: str = "a", **changes: Any) -> TaskRecord:
        """A task of round `number` for this device."""
        made = replace(self.kit.task(f"t-{number:04d}-{device}", device), round=number)
        return replace(made, **changes)

    def part(self, store: Store, task: TaskRecord, content: bytes = b"part") -> None:
        """A part of an update as an upload leaves it."""
        folder = store.files.spool(task.task_id, task.attempt)
        folder.mkdir(exist_ok=True)
        (folder / "part-0000.safetensors").write_bytes(content)

    def parts(self, store: Store, result: Result) -> list[bytes]:
        """What the average of a round reads of an update."""
        store.fetch_parts(result)
        folder = store.files.spool(result.task_id, result.attempt)
        return [(folder / f"part-{part.part:04d}.safetensors").read_bytes() for part in result.parts]

    def add_update(
        self, store: Store, task: TaskRecord, content: bytes = b"part", norms: Norms | None = None, **changes: Any
    ) -> Result:
        """A task with its recorded update and the part of it."""
        if store.task(task.task_id) is None:
            store.record_task(task)
        self.part(store, task, content)
        result: Result = self.kit.result(task, {0: content}, **changes)
        store.keep_parts(result)
        store.record_update(result, norms)
        return result


@dataclass(frozen=True)
class Postgres:
    """A running server."""

    socket_folder: Path

    def execute(self, statement: str) -> object:
        """The first value that a statement gives, if it gives any."""
        with psycopg.connect(f"host={self.socket_folder} user=postgres dbname=postgres", autocommit=True) as connection:
            done = connection.execute(statement.encode())
            row = done.fetchone() if done.description else None
        return row[0] if row else None

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        self.execute(f'CREATE DATABASE "{name}"')
        return f"postgresql://postgres:secret@/{name}?host={self.socket_folder}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """Debian's PostgreSQL in a folder of its own, on a Unix socket, as a user without rights."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not installed or not (installed[-1] / "initdb").exists():
        pytest.fail("these tests need PostgreSQL: apt-get install postgresql")
    programs = installed[-1]
    # Not among pytest's folders, which only their owner may enter.
    folder = Path(tempfile.mkdtemp(prefix="fedepth-postgres-"))
    # PostgreSQL refuses to run as root.
    user = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups") if os.getuid() == 0 else ()
    if user:
        shutil.chown(folder, "postgres", "postgres")

    def run(*command: str | Path) -> None:
        done = subprocess.run([*user, *command], cwd=folder, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            pytest.fail(f"{Path(command[0]).name}: {done.stdout}{done.stderr}")

    data, log = folder / "data", folder / "log"
    run(programs / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C")
    options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c max_connections=50"
    # Its output must not go to the pipes of pg_ctl, which would stay open as long as it runs.
    run(programs / "pg_ctl", "-D", data, "-l", log, "-o", options, "-w", "start")
    try:
        yield Postgres(folder)
    finally:
        run(programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def bucket_service() -> Iterator[str]:
    """A service of S3's kind, and where it is."""
    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield f"http://{host}:{port}"
        server.stop()


@pytest.fixture
def new_bucket(bucket_service: str) -> Callable[[], str]:
    """Makes an empty bucket and returns its URL with a prefix."""

    def make() -> str:
        name = f"test-{uuid.uuid4().hex[:12]}"
        s3fs.S3FileSystem(use_listings_cache=False).mkdir(name)
        return f"s3://{name}/jobs/demo"

    return make


@pytest.fixture(params=["sqlite", "postgres", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, kit: Any) -> Place:
    """An empty place of every kind."""
    made = Place(tmp_path / "state", kit)
    if request.param == "postgres":
        made.database = request.getfixturevalue("postgres").new_database()
    if request.param == "bucket":
        made.files = request.getfixturevalue("new_bucket")()
    return made


@pytest.fixture
def plain(tmp_path: Path, kit: Any) -> Place:
    """An empty place with SQLite and the directory."""
    return Place(tmp_path / "state", kit)


class Crash(Exception):
    """Stands for the end of the process."""


class Steps:
    """Ends the process, so to speak, before a certain step of all those that change what is durable.

    Attributes:
        taken: the steps that were taken so far, by name.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.taken: list[str] = []
        self._last = -1
        for owner, name in (
            (Database, "begin"),
            (Database, "checkpoint"),
            (Directory, "keep"),
            (Directory, "rename"),
            (Directory, "remove"),
            (Path, "replace"),
            (Path, "unlink"),
        ):
            patch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            if len(self.taken) == self._last:
                raise Crash(f"before step {self._last}, {name}")
            self.taken.append(name)
            return step(*arguments, **named)

        return counted

    def until(self, last: int, work: Callable[[], object]) -> bool:
        """Does `work`, but at most so many steps of it; whether it was done whole."""
        self.taken, self._last = [], last
        try:
            work()
        except Crash:
            return False
        finally:
            self._last = -1
        return True


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)
