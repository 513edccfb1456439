"""What a child says on standard error reaches whoever listens, to its last word."""

from __future__ import annotations

import asyncio
import sys

import pytest

from fedepth.child import Child
from fedepth.errors import ChildError

CODE = r"""
import sys
sys.stdin.readline()
sys.stderr.buffer.write(b"one\r\n\n  \ntw\xff\n" + b"x" * 70000 + b"\nlast words")
sys.exit(3)
"""


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
