"""Certificates for many devices, and the processes in which they live."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedepth_wire.tls import KEY_MODE, Identity, Role

from benchmarks.certificates import LabCertificates
from coordinator.security.authority import Subject, key_pem, new_key, read_authority
from coordinator.security.certificates import Certificates
from fedepth.child import module_argv
from fedepth.errors import ChildError
from fedepth.files import write_atomically

ANSWER_S = 120.0
_DAYS = 30
_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class Figures:
    """What the devices of one process, or of all, have seen since they were asked last.

    Attributes:
        seconds: from each question that need not wait to its answer.
        answers: to questions of all kinds.
        updates: that were accepted.
        errors: calls that failed, by what was said of them.
    """

    seconds: list[float] = field(default_factory=list)
    answers: int = 0
    updates: int = 0
    errors: dict[str, int] = field(default_factory=dict)


def enroll_many(certificates: LabCertificates, count: int, files: Sequence[Path]) -> None:
    """Makes certificates for so many devices, recorded as those of every device are, and divides them among files."""
    certificates.serve_options()  # makes the authority
    folder = certificates.folder
    authority, now = read_authority(folder / "authority.pem"), None
    registry = Certificates(folder).registry
    made: list[tuple[str, Identity]] = []
    issued = []
    for number in range(count):
        key, device_id = new_key(), str(uuid.uuid4())
        subject = Subject(Role.DEVICE, device_id, f"device-{number:04d}")
        now = now or authority.certificate.not_valid_before_utc.timestamp() + 86_400
        each = authority.issue(subject, key.public_key(), _DAYS, now)
        issued.append(each)
        made.append((device_id, Identity(key_pem(key), each.certificate, authority.pem)))
    registry.add_all(issued, "issued")
    for turn, path in enumerate(files):
        rows = [
            {"id": device_id, "key": each.key.decode(), "certificate": each.certificate.decode()}
            for device_id, each in made[turn :: len(files)]
        ]
        text = json.dumps({"authority": authority.pem.decode(), "devices": rows})
        write_atomically(path, text.encode(), KEY_MODE)


class Process:
    """A program that does what it is told in lines on its standard input, and answers each with a line of JSON."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    async def ask(self, words: str) -> Any:
        """What it answers.

        Raises:
            ChildError: it has ended, or takes too long.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(f"{words}\n".encode())
            await self._process.stdin.drain()
            line = await asyncio.wait_for(self._process.stdout.readline(), ANSWER_S)
        except (OSError, asyncio.TimeoutError) as error:
            raise ChildError(f"a process does not answer to {words!r} ({error!r}); see {self._log}") from None
        if not line:
            raise ChildError(f"a process ended when it was told {words!r}; see {self._log}")
        return json.loads(line)


@contextlib.asynccontextmanager
async def started(module: str, *argv: str, log: Path) -> AsyncIterator[Process]:
    """A program of this benchmark, which ends with the block."""
    with open(log, "ab") as output:
        process = await asyncio.create_subprocess_exec(
            *module_argv(module),
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=output,
            limit=_LINE_BYTES,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        yield Process(process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def ask_all(processes: Sequence[Process], words: str) -> list[Any]:
    """Asks all at once."""
    return list(await asyncio.gather(*(each.ask(words) for each in processes)))


def merged(answers: Sequence[Any]) -> Figures:
    """The figures of several processes."""
    return Figures(
        sorted(second for each in answers for second in each["seconds"]),
        sum(each["answers"] for each in answers),
        sum(each["updates"] for each in answers),
        dict(sum((Counter(each["errors"]) for each in answers), Counter[str]())),
    )
