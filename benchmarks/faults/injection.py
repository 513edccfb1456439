"""Rules that make a running program's system calls fail, or kill it at one of them (shim.c).

A control file is shared with the program: rules are set and lifted while it runs, and count what they did.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path

from fedepth.errors import FedepthError

RULES = 8
_RULE = struct.Struct("<IIIiiIIIII64s152s")
_SEEN = 28  # offsets of its counters
_FIRED = 32
_SOURCE = Path(__file__).with_name("shim.c")


class Calls(IntFlag):
    """Sets of system calls, as shim.c numbers them."""

    WRITE = 1
    SYNC = 2
    RENAME = 4
    UNLINK = 8
    MKDIR = 16
    OPEN = 32
    TRUNCATE = 64

    @classmethod
    def all(cls) -> Calls:
        """What needs a disk that can be written."""
        return cls.WRITE | cls.SYNC | cls.RENAME | cls.MKDIR | cls.OPEN | cls.TRUNCATE


class Action(IntEnum):
    """What happens at a call."""

    OBSERVE = 0
    FAIL = 1
    KILL_BEFORE = 2
    KILL_AFTER = 3


@dataclass(frozen=True)
class Rule:
    """Which calls are met, and what happens.

    Attributes:
        path: a pattern of fnmatch for the whole path, of what a rename makes; "<stderr>" for standard error.
        program: a part of the command line: a child process has the rules of its parent.
        error: of FAIL, such as errno.ENOSPC.
        first: the call that it begins with, from 1.
        count: for so many calls; 0 until it is lifted.
        after: the number of the rule that must have seen a call before this one counts; -1 for none.
    """

    calls: Calls
    path: str
    action: Action
    program: str = ""
    error: int = 0
    first: int = 1
    count: int = 1
    after: int = -1

    @property
    def program_is_child(self) -> bool:
        """Whether it is a child of the program that is started, whose end the program outlives."""
        return self.program.endswith(".process")

    def describe(self) -> str:
        """For people: "ENOSPC at write 2 of */spool/*"."""
        what = errno.errorcode.get(self.error, "?") if self.action is Action.FAIL else self.action.name.lower()
        names = "|".join(call.name.lower() for call in Calls if call in self.calls and call.name)
        lasting = "" if self.count == 1 else f" for {self.count} calls" if self.count else " for a while"
        return f"{what} at {names} {self.first} of {self.path}{lasting}"


class Control:
    """The rules of one program."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(RULES * _RULE.size))
        self.path = path
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def arm(self, number: int, rule: Rule) -> None:
        """Sets a rule; its counters begin at 0."""
        path, program = rule.path.encode(), rule.program.encode()
        if len(path) >= 152 or len(program) >= 64:
            raise ValueError(f"the pattern {rule.path} or the program {rule.program} is too long for the shim")
        self.lift(number)
        fields = (rule.calls, rule.action, rule.error, rule.after, rule.first, rule.count, 0, 0, 0, program, path)
        _RULE.pack_into(self._map, number * _RULE.size, 0, *fields)
        struct.pack_into("<I", self._map, number * _RULE.size, 1)  # last: the program reads the rest only then

    def lift(self, number: int) -> None:
        """The rule is over; its counters stay."""
        struct.pack_into("<I", self._map, number * _RULE.size, 0)

    def seen(self, number: int) -> int:
        """How many calls a rule has met."""
        return int(struct.unpack_from("<I", self._map, number * _RULE.size + _SEEN)[0])

    def fired(self, number: int) -> int:
        """How often a rule has done something."""
        return int(struct.unpack_from("<I", self._map, number * _RULE.size + _FIRED)[0])

    def close(self) -> None:
        self._map.close()


def compile_shim(folder: Path) -> Path:
    """Compiles the library that programs are started with.

    Raises:
        FedepthError: there is no C compiler, or it fails.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FedepthError("faults are injected by a small C library, and there is no cc, gcc or clang to compile it")
    output = folder / "shim.so"
    argv = [compiler, "-shared", "-fPIC", "-O2", "-o", str(output), str(_SOURCE), "-ldl"]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise FedepthError(f"{' '.join(argv)} ended with status {ended.returncode}:\n{ended.stderr}")
    return output


def environment(shim: Path, control: Control, journal: Path, trainer: str = "") -> Mapping[str, str]:
    """What a program is started with so that the rules in `control` hold for it and its children.

    Args:
        journal: gets what fires, and all that the program writes to standard error, whether or not that can be written.
        trainer: a module that agents start instead of their trainer; "" for the real one.
    """
    before = os.environ.get("LD_PRELOAD", "")
    return {
        "LD_PRELOAD": f"{shim}:{before}" if before else str(shim),
        "FAULTS_CONTROL": str(control.path),
        "FAULTS_JOURNAL": str(journal),
        "FAULTS_TRAINER": trainer,
        "FAULTS_PARENT": str(os.getpid()),
    }
