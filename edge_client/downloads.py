"""Files that come from the coordinator and are kept by their digest: model and graph of the job, weights of rounds.

STATE/graphs/DIGEST.json            the newest two of each
STATE/models/DIGEST.spec            what the job says of its model (fedepth_wire.task_messages)
STATE/weights/DIGEST.safetensors
STATE/indexes/DIGEST.json           of the weights with this digest (fedepth.tensor_index); the newest three
….partial                           what came so far of one that was cut

Where a device has other weights and the new ones have an index, only the tensors that it lacks are fetched. The file
still grows from its beginning to its end, so that what is there of it is all that a later try must know.
"""

from __future__ import annotations

import asyncio
import re
from bisect import bisect_right
from pathlib import Path

import structlog
from fedepth_wire.bounds import CHUNK_BYTES, MOST_ELEMENTS
from fedepth_wire.chunks import PartialFile
from fedepth_wire.task_messages import MOST_MODEL_BYTES
from fedepth_wire.v1 import federation_pb2 as pb

from edge_client.call_errors import CutError
from edge_client.streams import Streams
from fedepth.errors import ProtocolError, StateError
from fedepth.files import delete, disk_errors, file_digest, is_own_file, open_regular, read_regular
from fedepth.task import Task
from fedepth.tensor_index import (
    MOST_INDEX_BYTES,
    Segment,
    TensorIndex,
    decode_index,
    index_of,
    known_segments,
    missing_ranges,
    spans_of,
)

_KEPT_FILES = 2
_DIGEST = re.compile(r"[0-9a-f]{64}")
_log = structlog.get_logger()


class Downloads:
    """The files of one state directory."""

    def __init__(self, state: Path, streams: Streams) -> None:
        self._weights = state / "weights"
        self._indexes = state / "indexes"
        self._graphs = state / "graphs"
        self._models = state / "models"
        self._streams = streams
        self._doubted: set[str] = set()  # digests of files that came whole and were others
        self._growing: dict[Path, PartialFile] = {}  # one in each folder

    async def weights(self, task: Task) -> Path:
        """The task's global weights; see `_fetch`."""
        digest, size = task.weights_digest, task.weights_bytes
        name = f"{digest}.safetensors"
        with disk_errors("weights cannot be fetched and kept", self._weights):
            others = [path for path in self._weights.glob("*.safetensors") if path.name != name and is_own_file(path)]
            new = not is_own_file(self._weights / name)
        assembly = None
        if task.index_digest and others and new and digest not in self._doubted:
            found = await self._fetch(self._indexes, f"{digest}.json", task.index_digest, task.index_bytes)
            with disk_errors("weights that are here cannot be read", self._weights):
                assembly = await asyncio.to_thread(self._assembly, found, size, others)
        return await self._fetch(self._weights, name, digest, size, assembly)

    async def graph(self, task: Task) -> Path:
        """The traced model of the task's job; see `_fetch`."""
        return await self._fetch(self._graphs, f"{task.graph_digest}.json", task.graph_digest, task.graph_bytes)

    async def model(self, task: pb.Task) -> bytes:
        """The model that a task's message names (fedepth_wire.task_messages); see `_fetch`."""
        digest, size = task.model_digest, task.model_bytes
        if not _DIGEST.fullmatch(digest) or not 0 < size <= MOST_MODEL_BYTES:
            raise ProtocolError(f"a task names the model {digest[:80]!r} of {size} bytes")
        path = await self._fetch(self._models, f"{digest}.spec", digest, size)
        with disk_errors("a job's model cannot be read", self._models):
            return await asyncio.to_thread(read_regular, path, MOST_MODEL_BYTES)

    def _assembly(self, index: Path, size_bytes: int, others: list[Path]) -> _Assembly:
        """What of the weights with this index is in other files."""
        wanted = decode_index(read_regular(index, MOST_INDEX_BYTES), size_bytes)
        indexes = []
        for path in others:
            try:
                indexes.append((path, self._index(path)))
            except StateError as error:
                _log.warning("weights that are here cannot be used for the next", error=str(error))
        return _Assembly(wanted, known_segments(indexes))

    def _index(self, weights: Path) -> TensorIndex:
        """Of weights that are here: as it came with them, or made now."""
        kept = self._indexes / f"{weights.stem}.json"
        if not is_own_file(kept):
            return index_of(weights)
        try:
            return decode_index(read_regular(kept, MOST_INDEX_BYTES), weights.stat().st_size)
        except ProtocolError as error:
            _log.warning("an index that was kept is damaged; it is made anew", error=str(error))
            return index_of(weights)

    async def _fetch(
        self, folder: Path, name: str, digest: str, size_bytes: int, assembly: _Assembly | None = None
    ) -> Path:
        """A file of the coordinator, from disk if it is there, resumed if a part of it is.

        Raises:
            ProtocolError: the file came whole but is another one, or its stream ended early.
            DiskError: it cannot be kept.
        """
        if size_bytes <= 0:
            raise ProtocolError(f"{name}: a file of {size_bytes} bytes was announced")
        with disk_errors(f"{name} cannot be fetched and kept", folder):
            return await self._fetch_into(folder, name, digest, size_bytes, assembly)

    async def _fetch_into(
        self, folder: Path, name: str, digest: str, size_bytes: int, assembly: _Assembly | None
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        final, partial = folder / name, folder / f"{name}.partial"
        for path in folder.iterdir():
            if not is_own_file(path):
                delete(path)  # such as a FIFO, at which a reader and a writer would wait for ever
        if final.exists():
            if await asyncio.to_thread(file_digest, final) == digest:
                final.touch()
                self._forget_old(final)
                return final
            final.unlink()
        for other in folder.glob("*.partial"):
            if other != partial:
                other.unlink()
        growing = self._growing.get(folder)
        if growing is None or (growing.path, growing.size_bytes, growing.digest) != (partial, size_bytes, digest):
            growing = self._growing[folder] = PartialFile(partial, size_bytes, digest)
        await asyncio.to_thread(growing.resume)
        await self._fill(growing, assembly)
        try:
            await asyncio.to_thread(growing.seal, final, can_come_again=True)
        except ProtocolError:
            self._doubted.add(digest)
            raise
        self._doubted.discard(digest)
        del self._growing[folder]
        self._forget_old(final)
        return final

    def _forget_old(self, current: Path) -> None:
        """Keeps the newest of its kind; of indexes one more, which comes before its weights."""
        most = _KEPT_FILES + 1 if current.parent == self._indexes else _KEPT_FILES
        files = sorted(current.parent.glob(f"*{current.suffix}"), key=lambda path: path.stat().st_mtime_ns)
        others = [path for path in files if path != current]
        for path in others[: max(0, len(others) + 1 - most)]:
            path.unlink()

    async def _fill(self, growing: PartialFile, assembly: _Assembly | None) -> None:
        def take(offset: int, data: bytes) -> None:
            growing.append(offset, data)
            if assembly is not None:
                assembly.copy_into(growing)

        if assembly is not None:
            await asyncio.to_thread(assembly.copy_into, growing)
        while growing.held_bytes < growing.size_bytes:
            missing = [(growing.held_bytes, growing.size_bytes)]
            if assembly is not None:
                missing = assembly.missing(growing.held_bytes)[:MOST_ELEMENTS]
            try:
                await self._streams.fetch(growing.digest, missing, take, verify=growing.digest in self._doubted)
            except CutError as error:
                _log.debug("a download was cut; resuming", file=growing.path.name, error=str(error))


class _Assembly:
    """A file some of whose segments lie in other files."""

    def __init__(self, index: TensorIndex, known: dict[Segment, tuple[Path, int]]) -> None:
        self._index = index
        self._known = known
        self._spans = spans_of(index)
        self._begins = [begin for _, begin in self._spans]

    def missing(self, held_bytes: int) -> list[tuple[int, int]]:
        """What has to be fetched, from `held_bytes` on."""
        return missing_ranges(self._index, held_bytes, self._known)

    def copy_into(self, growing: PartialFile) -> None:
        """Adds what follows, as far as it is in other files.

        Raises:
            ProtocolError: one of them has become shorter.
            OSError: one cannot be read, or the file not be written.
        """
        while growing.held_bytes < growing.size_bytes:
            segment, begin = self._spans[bisect_right(self._begins, growing.held_bytes) - 1]
            source = self._known.get(segment)
            if source is None:
                return
            path, place = source
            end = begin + segment[0]
            with open_regular(path) as file:
                file.seek(place + growing.held_bytes - begin)
                while growing.held_bytes < end:
                    data = file.read(min(CHUNK_BYTES, end - growing.held_bytes))
                    if not data:
                        raise ProtocolError(f"{path} has become shorter")
                    growing.append(growing.held_bytes, data)
