"""Files that come from the coordinator and are kept by their digest: the job's graph, and the weights of rounds.

STATE/graphs/DIGEST.json, STATE/weights/DIGEST.safetensors     the newest two of each
….partial                                                      what came so far of one that was cut
"""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import structlog
from fedepth_wire.chunks import PartialFile
from fedepth_wire.v1.federation_pb2 import Chunk

from edge_client.call_errors import CutError
from edge_client.streams import Streams
from fedepth.errors import ProtocolError
from fedepth.files import disk_errors, file_digest
from fedepth.task import Task

_KEPT_FILES = 2
_log = structlog.get_logger()


class Downloads:
    """The files of one state directory."""

    def __init__(self, state: Path, streams: Streams) -> None:
        self._weights = state / "weights"
        self._graphs = state / "graphs"
        self._streams = streams
        self._doubted: set[str] = set()  # digests of files that came whole and were others
        self._growing: PartialFile | None = None

    async def weights(self, task: Task) -> Path:
        """The task's global weights; see `_fetch`."""
        return await self._fetch(
            self._weights, f"{task.weights_digest}.safetensors", task.weights_digest, task.weights_bytes
        )

    async def graph(self, task: Task) -> Path:
        """The traced model of the task's job; see `_fetch`."""
        return await self._fetch(self._graphs, f"{task.graph_digest}.json", task.graph_digest, task.graph_bytes)

    async def _fetch(self, folder: Path, name: str, digest: str, size_bytes: int) -> Path:
        """A file of the coordinator, from disk if it is there, resumed if a part of it is.

        Raises:
            ProtocolError: the file came whole but is another one, or its stream ended early.
            DiskError: it cannot be kept.
        """
        if size_bytes <= 0:
            raise ProtocolError(f"{name}: a file of {size_bytes} bytes was announced")
        with disk_errors(f"{name} cannot be fetched and kept", folder):
            return await self._fetch_into(folder, name, digest, size_bytes)

    async def _fetch_into(self, folder: Path, name: str, digest: str, size_bytes: int) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        final, partial = folder / name, folder / f"{name}.partial"
        for path in (final, partial):
            if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
                path.unlink()  # such as a FIFO, at which a reader and a writer would wait for ever
        if final.exists():
            if await asyncio.to_thread(file_digest, final) == digest:
                final.touch()
                _forget_old(final)
                return final
            final.unlink()
        for other in folder.glob("*.partial"):
            if other != partial:
                other.unlink()
        growing = self._growing
        if growing is None or growing.path != partial or growing.size_bytes != size_bytes:
            growing = self._growing = PartialFile(partial, size_bytes, digest)
        await asyncio.to_thread(growing.resume)
        await self._fill(growing)
        try:
            await asyncio.to_thread(growing.seal, final)
        except ProtocolError:
            self._doubted.add(digest)
            raise
        self._doubted.discard(digest)
        self._growing = None
        _forget_old(final)
        return final

    async def _fill(self, growing: PartialFile) -> None:
        def take(chunk: Chunk) -> None:
            growing.append(chunk.offset, chunk.data)

        while growing.held_bytes < growing.size_bytes:
            missing = [(growing.held_bytes, growing.size_bytes)]
            try:
                await self._streams.fetch(growing.digest, missing, take, verify=growing.digest in self._doubted)
            except CutError as error:
                _log.debug("a download was cut; going on", file=growing.path.name, error=str(error))


def _forget_old(current: Path) -> None:
    """Keeps the newest of its kind."""
    files = sorted(current.parent.glob(f"*{current.suffix}"), key=lambda path: path.stat().st_mtime_ns)
    others = [path for path in files if path != current]
    for path in others[: max(0, len(others) + 1 - _KEPT_FILES)]:
        path.unlink()
