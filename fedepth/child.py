"""A child process that speaks JSON lines over its standard streams, and ends when its standard input closes.

The agent starts its trainer and the coordinator its model worker this way: memory that Python and torch have taken is
given back for certain only when a process ends. Nothing that a child says on standard error is lost: it is passed on as
it is, or line by line to whoever wants it in a log.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from fedepth.errors import ChildError
from fedepth.files import NOT_JSON, has_working_directory
from fedepth.program import tell
from fedepth.timeout import within

LINE_LIMIT_BYTES = 4 << 20
HANG_S = 600.0  # in which a child that works says something, or takes some of the processor's time
IDLE_SHARE = 1e-4  # of a processor that a child takes which does nothing
_PIECE_BYTES = 64 << 10
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAST_WORDS_S = 1.0  # how long to wait for them where something else holds the pipe of a child that has ended


class Child:
    """A running child. Not safe for use by two tasks at once."""

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, on_line: Callable[[str], None] | None = None
    ) -> None:
        self.name = name
        self._process = process
        self._killed = False
        self._listening = on_line and asyncio.create_task(_listen(process, on_line))

    @classmethod
    async def start(
        cls,
        name: str,
        argv: Sequence[str],
        environment: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Child:
        """Starts `argv` with `environment` added to ours, in a session of its own.

        `on_line` is called with every line that it writes to standard error, which is ours without it.

        A session of its own keeps Ctrl-C from reaching the child before its parent has decided what to do; it still
        cannot outlive us, since its standard input closes when we end.
        """
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=None if on_line is None else asyncio.subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            limit=LINE_LIMIT_BYTES,
            start_new_session=True,
            cwd=None if has_working_directory() else "/",  # without one, torch's libraries end a process
        )
        return cls(name, process, on_line)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can be asked. One that was killed may take long to end, or for ever if it hangs in the kernel."""
        return self._process.returncode is None and not self._killed

    async def send(self, message: Any) -> None:
        """Writes one JSON line.

        Raises:
            ChildError: the child is gone.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            raise await self._gone() from None

    async def receive(self) -> Any:
        """Reads one JSON line, of a child that works on it.

        That may take any time, as long as it takes the processor's as well: a child that does neither waits for what
        does not come, such as a file on a disk that is gone, and whoever waits for it would do so for ever.

        Raises:
            ChildError: the child ended, wrote something else, or hangs and was killed.
        """
        try:
            line = await self._line()
        except ValueError:  # how asyncio says that the limit was passed
            raise ChildError(f"{self.name} (pid {self.pid}) wrote a line of over {LINE_LIMIT_BYTES} bytes") from None
        if not line:
            raise await self._gone()
        try:
            return msgspec.json.decode(line)
        except NOT_JSON as error:
            raise ChildError(f"{self.name} (pid {self.pid}) wrote {line[:80]!r}, which is not JSON: {error}") from None

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        reading = asyncio.ensure_future(self._process.stdout.readline())
        try:
            used = self._processor_seconds()
            while not (await asyncio.wait({reading}, timeout=HANG_S))[0]:
                before, used = used, self._processor_seconds()
                if used - before < HANG_S * IDLE_SHARE:
                    self.kill()
                    raise ChildError(
                        f"{self.name} (pid {self.pid}) has said nothing for {HANG_S:g} s, and done nothing; does it "
                        "wait for a disk or a network folder that does not answer?"
                    )
            return reading.result()
        finally:
            reading.cancel()

    def _processor_seconds(self) -> float:
        try:
            times = psutil.Process(self.pid).cpu_times()
        except psutil.Error:  # it is gone, of which its pipe tells
            return 0.0
        return float(times.user + times.system)

    async def messages(self) -> AsyncIterator[Any]:
        """Every message until the child ends, which raises ChildError."""
        while True:
            yield await self.receive()

    async def stop(self, grace_s: float = 5.0) -> None:
        """Closes the child's standard input, and kills it if it has not ended after `grace_s`."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await within(grace_s, self._process.wait())
        except asyncio.TimeoutError:
            self.kill()
            await self._process.wait()
        await self._heard()

    def kill(self) -> None:
        self._killed = True
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _heard(self) -> None:
        if self._listening:
            await asyncio.wait({self._listening}, timeout=_LAST_WORDS_S)
            self._listening.cancel()

    async def _gone(self) -> ChildError:
        returncode = await self._process.wait()
        await self._heard()
        how = f"was ended by signal {-returncode}" if returncode < 0 else f"ended with status {returncode}"
        return ChildError(f"{self.name} (pid {self.pid}) {how}", returncode=returncode)


async def _listen(process: asyncio.subprocess.Process, on_line: Callable[[str], None]) -> None:
    assert process.stderr is not None
    left = b""
    while data := await process.stderr.read(_PIECE_BYTES):
        *lines, left = (left + data).split(b"\n")
        if len(left) > _PIECE_BYTES:  # of a child that ends no line
            lines, left = [*lines, left], b""
        for line in filter(bytes.strip, lines):
            on_line(line.decode("utf-8", "backslashreplace").rstrip())
    if left.strip():
        on_line(left.decode("utf-8", "backslashreplace").rstrip())


def run_child(main: Callable[[], None]) -> None:
    """Runs a child's `main`, and ends quietly when it is interrupted, and when nobody listens any more: whoever started
    it is gone. Anything else is one sentence on standard error, and the trace is where a program's would be."""
    try:
        main()
    except SystemExit:
        raise
    except KeyboardInterrupt:
        os._exit(130)
    except BrokenPipeError:
        os._exit(0)  # without flushing what nobody reads, which would fail once more
    except BaseException as error:  # noqa: BLE001 - nothing passes unsaid
        spec = sys.modules["__main__"].__spec__
        sys.exit(tell(Path(sys.argv[0]).name if spec is None else spec.name, error))


def end_with_parent() -> None:
    """Has the kernel kill this process when the one that started it ends, however it ends: a worker that went on with
    its task would write where its successor writes."""
    import ctypes  # an idle agent loads this module, and has no use for it

    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)  # it ended just now


def module_argv(module: str) -> list[str]:
    """The command line that runs `module` in this interpreter."""
    return [sys.executable, "-m", module]
