"""What a child says on standard error reaches whoever listens, to its last word."""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from fedepth import child
from fedepth.child import Child
from fedepth.errors import ChildError

CODE = r"""
import sys
sys.stdin.readline()
sys.stderr.buffer.write(b"one\r\n\n  \ntw\xff\n" + b"x" * 70000 + b"\nlast words")
sys.exit(3)
"""


FAILS = """
from fedepth.child import run_child
def main():
    raise {error}
run_child(main)
"""


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        ("ZeroDivisionError('a\\nb')", 70, r"-c: this is a bug in fedepth: ZeroDivisionError: a\nb; please report it"),
        ("MemoryError('refused')", 1, "-c: memory ran out"),
        ("SystemExit(3)", 3, ""),
        ("OSError(28, 'No space left on device')", 1, "-c: No space left on device"),
    ],
)
def test_a_child_that_fails_says_one_sentence(error: str, status: int, says: str, tmp_path: Path) -> None:
    """Its trace is where that of a program would be."""
    environment = {**os.environ, "FEDEPTH_BUGS": str(tmp_path / "bugs")}
    command = [sys.executable, "-c", FAILS.format(error=error)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)
    assert ended.returncode == status
    assert ended.stderr.startswith(says) and ended.stderr.count("\n") == bool(says)
    assert len(list(tmp_path.glob("bugs/*.txt"))) == (status == 70)


def test_lines_of_a_child_are_passed_on_also_when_it_fails() -> None:
    said: list[str] = []

    async def scene() -> None:
        child = await Child.start("child", [sys.executable, "-S", "-c", CODE], on_line=said.append)
        await child.send({})
        with pytest.raises(ChildError, match="ended with status 3"):
            await child.receive()
        assert said[-1] == "last words"  # before the error is
        await child.stop()

    asyncio.run(scene())
    assert said[:2] == ["one", "tw\\xff"]
    assert "".join(said[2:-1]) == "x" * 70000


async def said_by(code: str) -> object:
    """The first message of a child that does this."""
    running = await Child.start("child", [sys.executable, "-c", code])
    try:
        return await running.receive()
    finally:
        running.kill()
        await running.stop()


STOPPED = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
BLOCKED = """
import sys, threading
def lives():
    while True:
        threading.Event().wait(0.1)
threading.Thread(target=lives, daemon=True).start()
sys.stdin.read()
"""


@pytest.mark.parametrize("code", [STOPPED, BLOCKED])
def test_a_child_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Whoever waits for it would wait for ever. That one of its threads lives says nothing of the others."""
    monkeypatch.setattr(child, "IDLE_SHARE", 0.1)  # what a start takes is a large part of so short a time
    monkeypatch.setattr(child, "HANG_S", 0.5)
    with pytest.raises(ChildError, match=r"has said nothing for 0\.5 s, and done nothing; does it wait for a disk"):
        asyncio.run(said_by(code))


def test_a_child_that_was_killed_is_not_asked_again() -> None:
    """Its end may take longer than it takes to ask another one in its place."""

    async def scene() -> None:
        running = await Child.start("child", [sys.executable, "-c", "input()"])
        assert running.alive
        running.kill()
        assert not running.alive
        await running.stop()

    asyncio.run(scene())


def test_a_step_may_take_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "HANG_S", 1.0)  # in which even a busy machine gives it a tick of the clock
    works = "import time\nwhile time.process_time() < 2: pass\nprint('{}', flush=True)\ninput()"
    assert asyncio.run(said_by(works)) == {}


def test_a_child_that_ends_with_its_parent_does_so_however_that_ends() -> None:
    child = "import time; import fedepth.child as c; c.end_with_parent(); print(1, flush=True); time.sleep(60)"
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, start_new_session=True)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    watched = os.pidfd_open(pid)
    process.kill()
    process.wait()
    process.stdout.close()
    assert select.select([watched], [], [], 30)[0]
    os.close(watched)
