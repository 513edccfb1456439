"""What a federation keeps its state on, other than a folder: a PostgreSQL server, a bucket, a small disk of its own."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedepth.errors import FedepthError

CALL_S = 120.0
_PIECE_BYTES = 1 << 20


class NotHereError(FedepthError):
    """This machine does not have what a scenario needs; the message says what."""


class Outside:
    """Where state lies, for as long as a federation lives. Each kind overrides what it changes.

    Attributes:
        database: the URL that the coordinator is given; "" for none.
        files: that of its files.
        variables: of the environment of all programs.
        is_template: whether the state directory may begin as a copy of the prepared one.
    """

    database = ""
    files = ""
    is_template = True

    def __init__(self) -> None:
        self.variables: Mapping[str, str] = {}

    def prepare(self, folder: Path) -> None:
        """Called once the federation has its folder, before anything lies in it."""

    def close(self) -> None:
        """Ends what was started; a second time does nothing."""


class PostgresServer(Outside):
    """Debian's PostgreSQL in a folder of its own, on a Unix socket, as a user without rights.

    Raises:
        NotHereError: it is not installed.
    """

    is_template = False  # the record of the template is another database

    def __init__(self) -> None:
        super().__init__()
        psycopg = _module("psycopg")
        installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not installed:
            raise NotHereError("PostgreSQL is not installed: apt-get install postgresql")
        self._programs = installed[-1].parent
        self._folder = Path(tempfile.mkdtemp(prefix="faults-postgres-"))
        # PostgreSQL refuses to run as root.
        self._user: Sequence[str] = ()
        if os.getuid() == 0:
            self._user = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")
            shutil.chown(self._folder, "postgres", "postgres")
        arguments = ("-U", "postgres", "--auth=trust", "-E", "UTF8", "--locale=C")
        self._run("initdb", "-D", str(self._data), *arguments)
        self.start()
        with psycopg.connect(f"host={self._folder} user=postgres dbname=postgres", autocommit=True) as connection:
            connection.execute("CREATE DATABASE faults")
        self.database = f"postgresql://postgres@/faults?host={self._folder}"

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def start(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories='{self._folder}'"
        # Its output must not go to our pipes, which would stay open as long as it runs.
        self._run("pg_ctl", "-D", str(self._data), "-l", str(self._folder / "log"), "-o", options, "-w", "start")

    def stop(self, mode: str) -> None:
        """Ends it: "fast" breaks connections and ends in order, "immediate" is as a crash."""
        self._run("pg_ctl", "-D", str(self._data), "-m", mode, "-w", "stop")

    def close(self) -> None:
        if self._folder.exists():
            with contextlib.suppress(FedepthError):  # it is not running
                self.stop("immediate")
            shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, name: str, *arguments: str) -> None:
        command = [*self._user, str(self._programs / name), *arguments]
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, check=False, timeout=CALL_S)
        if done.returncode:
            raise FedepthError(f"{name} ended with status {done.returncode}: {done.stdout}{done.stderr}")


class BucketService(Outside):
    """A service of S3's kind (moto's) with one bucket. What it holds survives `stop`.

    Raises:
        NotHereError: moto or s3fs is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of every request
        s3fs, self._moto = _module("s3fs"), _module("moto.server")
        self._server = self._new_server(0)
        _, self._port = self._server.get_host_and_port()
        address = f"http://127.0.0.1:{self._port}"
        self.variables = {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        name = f"faults-{self._port}"
        system = s3fs.S3FileSystem(
            key="key", secret="secret", endpoint_url=address, use_listings_cache=False, skip_instance_cache=True
        )
        system.mkdir(name)
        self.files = f"s3://{name}/jobs/faults"

    def start(self) -> None:
        self._server = self._new_server(self._port)

    def stop(self) -> None:
        self._server.stop()

    def close(self) -> None:
        with contextlib.suppress(Exception):  # it was stopped before
            self._server.stop()

    def _new_server(self, port: int) -> Any:
        server = self._moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        server.start()
        return server


class SmallDisk(Outside):
    """A file system in memory under a folder of the federation, small enough to be filled.

    Raises:
        NotHereError: only root may mount one.
    """

    def __init__(self, name: str, size_bytes: int) -> None:
        super().__init__()
        if os.getuid() != 0:
            raise NotHereError("a small disk is mounted, which only root may do")
        self._name, self._size_bytes = name, size_bytes
        self._at: Path | None = None

    def prepare(self, folder: Path) -> None:
        at = folder / self._name
        at.mkdir()
        argv = ["mount", "-t", "tmpfs", "-o", f"size={self._size_bytes}", "tmpfs", str(at)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotHereError(f"a small disk cannot be mounted: {done.stderr.strip()}")
        self._at = at

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """There is not one byte left within the block."""
        assert self._at is not None
        ballast = self._at / ".ballast"
        try:
            with open(ballast, "wb", buffering=0) as file:
                for size in (_PIECE_BYTES, 1):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(size)):
                            pass
            yield
        finally:
            ballast.unlink(missing_ok=True)

    def close(self) -> None:
        if self._at is not None:
            subprocess.run(["umount", "-l", str(self._at)], capture_output=True, check=False)
            self._at = None


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise NotHereError(f"{error.name} is not installed: pip install 'fedepth[test]'") from None
