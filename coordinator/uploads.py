"""Takes updates in: parts into the spool, resumable and bounded; then a commit that checks and records.

A part grows as `part-0000.DIGEST.partial`, and gets its name when it is whole, right and durable.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from fedepth_wire.chunks import PartialFile
from fedepth_wire.v1.federation_pb2 import Chunk

from coordinator.store.records import Store, TaskRecord
from fedepth.aggregation.rules import Norms
from fedepth.errors import ProtocolError, StateError, UnavailableError, UpdateError
from fedepth.files import Digests, delete, is_own_file, make_durable
from fedepth.layout import ModelLayout
from fedepth.task import PartInfo, Result, TrainingSpec

SPARE_PARTS = 3  # beyond one per unit and the head
SPARE_BYTES = 1 << 20

_DIGEST = re.compile(r"[0-9a-f]{64}")

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class PartHeader:
    """Which part of which update a stream of chunks carries."""

    task_id: str
    attempt: int
    device_id: str
    part: int
    size_bytes: int
    digest: str


class Uploads:
    """The upload side of the coordinator."""

    def __init__(
        self,
        store: Store,
        layout: ModelLayout,
        accepts: Callable[[str], bool],
        check_room: Callable[[int], None],
        record: Callable[[Result, Norms], Awaitable[None]],
        base: Callable[[], Path],
        training: Callable[[int], TrainingSpec],
        learn_norms: bool = True,
    ) -> None:
        """`accepts` says whether an update for a task would count now; `check_room`, which is called in a thread,
        raises UnavailableError if so many bytes more should not be written; `record` records an update that is
        admitted, or raises UpdateError because it is late by now; `base` is where the weights lie that updates are
        trained from; `training`: of a round, by its number; `learn_norms`: refuse an update that goes much further
        than the others of its round."""
        self._store = store
        self._layout = layout
        self._accepts = accepts
        self._check_room = check_room
        self._record = record
        self._base = base
        self._training = training
        self._learn_norms = learn_norms
        self._streams: dict[Path, object] = {}
        self._growing: dict[Path, PartialFile] = {}  # by what they will be called
        self._digests = Digests()  # of whole parts
        # One admission works for a core and takes some 20 MiB; all devices of a round may finish at once.
        self._admitting = asyncio.Semaphore(len(os.sched_getaffinity(0)))
        self._scales: dict[Path, float] = {}  # of the parameters of the weights that updates are trained from
        self._locks: dict[str, asyncio.Lock] = {}

    @property
    def limit_bytes(self) -> int:
        return 2 * self._layout.size_bytes + SPARE_BYTES

    @property
    def limit_parts(self) -> int:
        return len(self._layout.units) + 1 + SPARE_PARTS

    async def receive(
        self, header: PartHeader, chunks: AsyncIterable[Chunk], acknowledge: Callable[[int], Awaitable[None]]
    ) -> None:
        """Takes one part, until it is whole, right and durable.

        Args:
            chunks: what the device sends, once it was told where to begin.
            acknowledge: tells it how many bytes are here, first of all and after every chunk but the last.

        Raises:
            UpdateError: the part is not wanted: "late", "device" or "size".
            UnavailableError: there is no room for it now.
            ProtocolError: the stream cannot be used; what is here of the part stays, if that is right.
        """
        if await self._is_recorded(header):
            return
        try:
            await self._receive(header, chunks, acknowledge)
        except UpdateError:
            # The update may have been recorded meanwhile, by a commit whose answer was lost: then it counts, and a
            # device that is told "late" would take back what it has kept of it.
            if not await self._is_recorded(header):
                raise

    async def _is_recorded(self, header: PartHeader) -> bool:
        found = self._store.short(self._recorded_part, header.task_id, header.part, header.digest)
        return await found is not None

    async def _receive(
        self, header: PartHeader, chunks: AsyncIterable[Chunk], acknowledge: Callable[[int], Awaitable[None]]
    ) -> None:
        await self._check_header(header)
        whole = _part_path(self._store.files.spool(header.task_id, header.attempt), header.part)
        stream = object()
        self._streams[whole] = stream
        try:
            growing = await self._undivided(header.task_id, self._begin, header, whole)
            if growing is None:
                return  # sent again after a lost answer; the commit checks its digest
            held = growing.held_bytes
            await acknowledge(held)
            if held < header.size_bytes:
                async for chunk in chunks:
                    if not self._accepts(header.task_id):
                        raise late(header.task_id)
                    held = await self._undivided(header.task_id, self._append, header, whole, stream, growing, chunk)
                    if held == header.size_bytes:
                        break
                    await acknowledge(held)
            if held != header.size_bytes:
                raise ProtocolError(f"part {header.part}: the stream ended at {held} of {header.size_bytes} bytes")
            # Not cancelled with its stream: a commit that follows must find the part sealed, or seal it itself.
            await self._undivided(header.task_id, self._seal, header, growing, whole)
        finally:
            if self._streams.get(whole) is stream:
                del self._streams[whole]

    async def _undivided(
        self, task_id: str, work: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Work on the files of a task, one at a time. It goes on when its stream breaks: what comes next must not meet
        a thread that still writes."""

        async def alone() -> T:
            async with self._lock(task_id):
                return await work(*args, **kwargs)

        return await asyncio.shield(asyncio.create_task(alone()))

    async def _begin(self, header: PartHeader, whole: Path) -> PartialFile | None:
        """Makes the folder of an attempt, and looks what is there of the part; None: all of it.

        Beside it the last of the other attempts stays, and no more: a device that trains a task for the third time has
        nothing of the first, and a task must not fill the disk by its attempts, in whatever order they are sent.
        """
        path = _partial_path(whole.parent, header.part, header.digest)
        growing = self._growing.get(whole)
        if growing is None or (growing.digest, growing.size_bytes) != (header.digest, header.size_bytes):
            growing = PartialFile(path, header.size_bytes, header.digest)
        if not await asyncio.to_thread(self._found_ready, whole, growing):
            return None
        if await self._store.short(self._store.update, header.task_id) is not None:
            raise late(header.task_id)  # recorded while this stream waited: nothing here may change any more
        total = await self._claimed(whole) + header.size_bytes
        if total > self.limit_bytes:
            raise UpdateError("size", f"parts of {total} bytes together, allowed are {self.limit_bytes}")
        if not await asyncio.to_thread(whole.parent.exists):
            others = await asyncio.to_thread(self._store.files.spooled_attempts, header.task_id)
            for other in others[:-1]:
                await asyncio.to_thread(self._store.files.drop_spool, header.task_id, other)
                self._forget(header.task_id, other)
        await asyncio.to_thread(_make_ready, whole, path)
        self._growing[whole] = growing
        return growing

    async def _claimed(self, whole: Path) -> int:
        """Bytes that are in the folder of an attempt, or on their way into it, beside those of a part that begins.

        What is whole of that part counts: it stays until it is replaced. What was growing of it goes.
        """
        growing = {
            each.path: each.size_bytes
            for other, each in self._growing.items()
            if other.parent == whole.parent and other != whole
        }
        there = await asyncio.to_thread(_sizes, whole.parent)
        own = f"{whole.stem}."
        goes = {path for path in there if path.suffix == ".partial" and path.name.startswith(own)}
        return sum(size for path, size in {**there, **growing}.items() if path not in goes)

    def _found_ready(self, whole: Path, growing: PartialFile) -> bool:
        """Whether there is something to receive, and room for it."""
        same_size = is_own_file(whole) and whole.stat().st_size == growing.size_bytes
        if same_size and self._digests.of(whole) == growing.digest:
            return False
        self._check_room(growing.size_bytes - growing.resume())
        return True

    async def _append(self, header: PartHeader, whole: Path, stream: object, growing: PartialFile, chunk: Chunk) -> int:
        if self._streams.get(whole) is not stream:
            raise ProtocolError(f"part {header.part} of {header.task_id} is being sent in a newer stream")
        return await asyncio.to_thread(growing.append, chunk.offset, chunk.data)

    async def _seal(self, header: PartHeader, growing: PartialFile, whole: Path) -> None:
        if await self._store.short(self._store.update, header.task_id) is None:  # what is recorded never changes
            await asyncio.to_thread(_seal, growing, whole, self._digests)
        if self._growing.get(whole) is growing:
            del self._growing[whole]

    async def commit(self, result: Result) -> bool:
        """Checks and records an update. True if it is new, False if it was recorded before.

        Raises:
            UpdateError: it is refused; unless "late" or "duplicate", its spool is gone and the task has ended.
            ProtocolError: a part came damaged and is gone; send it again.
            UnavailableError: it cannot be recorded now.
        """
        store = self._store
        if await store.short(store.task, result.task_id) is None:
            raise late(result.task_id)  # without a lock: strangers may name any number of tasks
        async with self._lock(result.task_id):
            recorded = await store.short(store.update, result.task_id)
            if recorded is not None:
                _require_same(recorded, result)
                return False
            task = await store.short(store.task, result.task_id)
            if task is None or not self._accepts(result.task_id):
                raise late(result.task_id)
            if result.device_id != task.device_id:  # another's mistake must not cost the owner its spool
                raise UpdateError("device", f"task {task.task_id} was not given to {result.device_id[:80]}")
            try:
                async with self._admitting:
                    norms = await asyncio.to_thread(self._admit, result, task)
            except UpdateError:
                await asyncio.to_thread(store.files.drop_spool, task.task_id, result.attempt)
                self._forget(task.task_id, result.attempt)
                raise
            await self._record(result, norms)
            self._forget(task.task_id, result.attempt)
            return True

    def paths(self, result: Result) -> tuple[Path, ...]:
        """Where the parts of a recorded update lie, in the order of its result."""
        folder = self._store.files.spool(result.task_id, result.attempt)
        return tuple(_part_path(folder, part.part) for part in result.parts)

    def forget_round(self) -> None:
        """Drops what is remembered of uploads; for when a round has closed."""
        self._growing.clear()
        self._scales.clear()
        self._locks = {task: lock for task, lock in self._locks.items() if lock.locked()}

    def _admit(self, result: Result, task: TaskRecord) -> Norms:
        # numpy: only when there is an update
        from coordinator.admission import check_norms, check_origin, check_result, check_update
        from fedepth.aggregation.norms import update_norms

        in_force = self._store.latest_round()
        training = self._training(task.round)
        if in_force is not None:  # a task that may be answered is of the round after it
            check_origin(result, in_force.digest, training.encoding)
        layout = self._layout.without_statistics() if training.fixed_statistics else self._layout
        check_result(result, task, layout, self.limit_parts)
        parts = self._whole_parts(result)
        check_update(parts, layout.as_sent(training.encoding), result)
        try:
            change = update_norms(self._base(), parts, layout.parameters, self._scales)
        except StateError as error:  # the parts have been looked at, so it is the base
            raise UnavailableError(f"the update cannot be compared with the weights before it: {error}") from error
        norms = change.per_step(result.steps(training))
        if self._learn_norms:
            check_norms(norms, self._store.norms_of(task.round))
        self._store.keep_parts(result)
        return norms

    def _whole_parts(self, result: Result) -> Sequence[Path]:
        paths = self.paths(result)
        if sum(part.size_bytes for part in result.parts) > self.limit_bytes:
            raise UpdateError("size", f"the parts have more than {self.limit_bytes} bytes together")
        for path, part in zip(paths, result.parts, strict=True):
            partial = _partial_path(path.parent, part.part, part.digest)
            if is_own_file(partial) and partial.stat().st_size == part.size_bytes:
                # All bytes came, but the stream or the coordinator ended before the part got its name.
                growing = PartialFile(partial, part.size_bytes, part.digest)
                growing.resume()
                _seal(growing, path, self._digests)
            if not is_own_file(path):
                raise ProtocolError(f"part {part.part} is not here; send it")
            if path.stat().st_size != part.size_bytes or self._digests.of(path) != part.digest:
                path.unlink()  # it may have changed on this disk, and the device has it still
                raise ProtocolError(f"part {part.part} here is not the one that the update names; send it again")
        return paths

    async def _check_header(self, header: PartHeader) -> None:
        task = await self._store.short(self._store.task, header.task_id)
        if task is None or not self._accepts(header.task_id):
            raise late(header.task_id)
        if header.device_id != task.device_id:
            raise UpdateError("device", f"task {task.task_id} was given to {task.device_id}, not {header.device_id}")
        if not 1 <= header.attempt <= task.attempt:
            raise UpdateError("plan", f"attempt {header.attempt} of {task.task_id}, given were 1 to {task.attempt}")
        if not 0 <= header.part < self.limit_parts:
            raise UpdateError("size", f"part number {header.part}, allowed are 0 to {self.limit_parts - 1}")
        if not _DIGEST.fullmatch(header.digest):
            raise ProtocolError(f"{header.digest[:80]!r} is not a sha256 in hex")
        if header.size_bytes <= 0:
            raise ProtocolError(f"a part of {header.size_bytes} bytes")
        if header.size_bytes > self.limit_bytes:
            raise UpdateError("size", f"a part of {header.size_bytes} bytes, allowed are {self.limit_bytes}")

    def _recorded_part(self, task_id: str, part: int, digest: str) -> PartInfo | None:
        result = self._store.update(task_id)
        parts = () if result is None else result.parts
        return next((each for each in parts if each.part == part and each.digest == digest), None)

    def _lock(self, task_id: str) -> asyncio.Lock:
        return self._locks.setdefault(task_id, asyncio.Lock())

    def _forget(self, task_id: str, attempt: int) -> None:
        folder = self._store.files.spool(task_id, attempt)
        self._growing = {whole: each for whole, each in self._growing.items() if whole.parent != folder}


def _require_same(recorded: Result, result: Result) -> None:
    """Raises UpdateError if an update is not the recorded one: acknowledging it would acknowledge what is not kept."""
    if (recorded.attempt, recorded.device_id, recorded.parts) != (result.attempt, result.device_id, result.parts):
        raise UpdateError(
            "duplicate",
            f"an update of attempt {recorded.attempt} of {recorded.task_id} is recorded, and it is not this one "
            f"(attempt {result.attempt})",
        )


def _make_ready(whole: Path, partial: Path) -> None:
    """Makes the folder of an attempt, if need be."""
    folder = whole.parent
    if not folder.exists():
        folder.mkdir()
        make_durable(folder)
    if not is_own_file(whole):
        delete(whole)
    if not partial.exists():  # those of other digests: what is sent anew takes the room of what it was before
        for other in folder.glob(f"{whole.stem}.*.partial"):
            delete(other)


def _seal(growing: PartialFile, whole: Path, digests: Digests) -> None:
    if growing.path.exists():  # or a stream that ran beside this one was faster
        growing.seal(whole)
        digests.note(whole, growing.digest)


def _sizes(folder: Path) -> dict[Path, int]:
    """What is there of all parts, whole or growing; nothing where there is no such folder."""
    return {path: path.stat().st_size for path in folder.glob("part-*") if is_own_file(path)}


def _part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:04d}.safetensors"


def _partial_path(folder: Path, part: int, digest: str) -> Path:
    return folder / f"part-{part:04d}.{digest[:16]}.partial"


def late(task_id: str) -> UpdateError:
    """The refusal of an update whose round does not wait for it."""
    return UpdateError("late", f"task {task_id[:80]} is no longer wanted: its round is closed or never existed")
