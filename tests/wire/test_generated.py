"""The checked-in protobuf code is what the generator makes of the .proto files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("grpc_tools", reason="needs the extra fedepth[dev]")

PROTO = Path(__file__).parents[2] / "proto"
CHECKED_IN = PROTO / "fedepth_wire" / "v1"
NAMES = ("federation", "trust")
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def test_the_generated_code_is_current(tmp_path: Path) -> None:
    # The plugins of mypy-protobuf are looked up on PATH; they lie beside the interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    subprocess.run(
        [sys.executable, str(PROTO / "generate.py"), str(tmp_path)],
        check=True,
        env={**os.environ, "PATH": path},
    )
    fresh = {file.name: file.read_text() for file in (tmp_path / "fedepth_wire" / "v1").iterdir()}
    assert sorted(fresh) == sorted(f"{name}{suffix}" for name in NAMES for suffix in SUFFIXES)
    stale = [name for name, text in fresh.items() if (CHECKED_IN / name).read_text() != text]
    assert not stale, f"{', '.join(stale)} differ: run `python proto/generate.py` and commit the result"


def test_no_generated_code_is_left_over() -> None:
    generated = {file.name for file in CHECKED_IN.iterdir() if "_pb2" in file.name}
    assert generated == {f"{name}{suffix}" for name in NAMES for suffix in SUFFIXES}
