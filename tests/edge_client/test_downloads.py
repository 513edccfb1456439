"""Weights of which a device has some tensors already: it fetches the others, and no more."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedepth_wire.chunks import Source

from edge_client.call_errors import CutError
from edge_client.downloads import Downloads
from fedepth.errors import ProtocolError
from fedepth.task import Task
from fedepth.tensor_index import encode_index, index_of
from fedepth.weights import load_numpy, save

PIECE = 1000


@dataclass
class FakeStreams:
    """Sends files by digest, in small pieces; `cuts` are numbers of pieces after which a stream is cut."""

    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    asked: list[tuple[str, list[tuple[int, int]], bool]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)

    async def fetch(
        self, digest: str, ranges: Sequence[tuple[int, int]], take: Callable[[int, bytes], None], verify: bool = False
    ) -> None:
        self.asked.append((digest, list(ranges), verify))
        pieces = Source(self.files[digest], 0, digest).pieces(ranges)
        left, most = sum(end - begin for begin, end in ranges), self.cuts.pop(0) if self.cuts else 1 << 30
        while left:
            if not most:
                raise CutError("cut")
            most -= 1
            chunk = pieces.next(PIECE)
            take(chunk.offset, chunk.data)
            left -= len(chunk.data)
            self.sent[digest] = self.sent.get(digest, 0) + len(chunk.data)


class Rounds:
    """Weights of a model with a large frozen part, round by round, as a coordinator offers them."""

    def __init__(self, folder: Path, task: Task) -> None:
        self.folder, self.streams, self._task = folder, FakeStreams(), task
        folder.mkdir()
        self.tensors = {
            "embedding.weight": np.random.default_rng(0).normal(size=(200, 100)).astype(np.float32),
            **{f"unit{number}.weight": np.full((30, 40), number, np.float32) for number in range(4)},
        }

    def next(self, *changed: str, number: int) -> Task:
        """The task of a round before which these tensors have changed."""
        for name in changed:
            self.tensors[name] = self.tensors[name] + np.float32(0.01 * number)
        path = self.folder / f"{number}"
        digest = save(path, self.tensors)
        index = encode_index(index_of(path))
        index_digest = hashlib.sha256(index).hexdigest()
        self.streams.files |= {digest: path.read_bytes(), index_digest: index}
        return replace(
            self._task,
            weights_digest=digest,
            weights_bytes=path.stat().st_size,
            index_digest=index_digest,
            index_bytes=len(index),
        )

    def sent(self, task: Task) -> tuple[int, int]:
        """Bytes that were sent of the weights and of their index."""
        return self.streams.sent.get(task.weights_digest, 0), self.streams.sent.get(task.index_digest, 0)


@pytest.fixture
def rounds(tmp_path: Path, make_task: Callable[..., Task]) -> Rounds:
    return Rounds(tmp_path / "rounds", make_task())


def run(rounds: Rounds, state: Path, scene: Callable[[Downloads], Awaitable[None]]) -> None:
    asyncio.run(scene(Downloads(state, rounds.streams)))  # type: ignore[arg-type]


def test_only_tensors_that_have_changed_are_fetched(rounds: Rounds, tmp_path: Path) -> None:
    async def scene(downloads: Downloads) -> None:
        first = rounds.next(number=1)
        await downloads.weights(first)
        assert rounds.sent(first) == (first.weights_bytes, 0)  # with nothing here, an index would be for nothing
        for number, changed in ((2, ("unit3.weight",)), (3, ("unit0.weight", "unit2.weight")), (4, ())):
            task = rounds.next(*changed, number=number)
            path = await downloads.weights(task)
            assert {name: tensor.tobytes() for name, tensor in load_numpy(path).items()} == {
                name: tensor.tobytes() for name, tensor in rounds.tensors.items()
            }
            if changed:
                assert rounds.sent(task) == (len(changed) * 30 * 40 * 4, task.index_bytes)

    run(rounds, tmp_path / "device", scene)
    # 105 kB of weights; frozen embeddings and two of four units are not sent again.
    assert sum(rounds.streams.sent.values()) < 105_000 + 3 * 4_800 + 2_000


def test_tensors_of_either_of_the_last_two_weights_count(rounds: Rounds, tmp_path: Path) -> None:
    async def scene(downloads: Downloads) -> None:
        await downloads.weights(rounds.next(number=1))
        before = dict(rounds.tensors)
        await downloads.weights(rounds.next("unit1.weight", number=2))
        rounds.tensors["unit1.weight"] = before["unit1.weight"]  # such as after a rollback
        task = rounds.next("unit2.weight", number=3)
        await downloads.weights(task)
        assert rounds.sent(task)[0] == 30 * 40 * 4

    run(rounds, tmp_path / "device", scene)


@pytest.mark.parametrize("cuts", [[1], [3, 2], [5, 0, 1]])
def test_a_cut_and_a_restart_cost_nothing(rounds: Rounds, tmp_path: Path, cuts: list[int]) -> None:
    async def first(downloads: Downloads) -> None:
        await downloads.weights(rounds.next(number=1))

    async def second(downloads: Downloads) -> None:
        rounds.streams.cuts = [100, *cuts]  # the index comes whole
        await downloads.weights(task)
        assert rounds.sent(task)[0] == 3 * 30 * 40 * 4

    run(rounds, tmp_path / "device", first)
    task = rounds.next("unit0.weight", "unit1.weight", "unit3.weight", number=2)
    run(rounds, tmp_path / "device", second)


def test_it_goes_on_after_a_restart_in_the_middle(rounds: Rounds, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    async def first(downloads: Downloads) -> None:
        await downloads.weights(rounds.next(number=1))

    async def second(downloads: Downloads) -> None:
        fetch = rounds.streams.fetch

        async def killed(digest: str, ranges: Any, take: Any, verify: bool = False) -> None:
            if digest == task.weights_digest:
                rounds.streams.cuts = [3]
                with pytest.raises(CutError):
                    await fetch(digest, ranges, take, verify)
                raise Killed
            await fetch(digest, ranges, take, verify)

        rounds.streams.fetch = killed  # type: ignore[method-assign]
        with pytest.raises(Killed):
            await downloads.weights(task)
        rounds.streams.fetch = fetch  # type: ignore[method-assign]

    async def third(downloads: Downloads) -> None:
        await downloads.weights(task)
        assert rounds.sent(task) == (2 * 30 * 40 * 4, task.index_bytes)

    run(rounds, tmp_path / "device", first)
    task = rounds.next("unit0.weight", "unit3.weight", number=2)
    run(rounds, tmp_path / "device", second)
    run(rounds, tmp_path / "device", third)


def test_where_own_weights_have_rotted_all_of_the_new_ones_are_fetched(rounds: Rounds, tmp_path: Path) -> None:
    async def scene(downloads: Downloads) -> None:
        await downloads.weights(rounds.next(number=1))
        old = await downloads.weights(rounds.next("unit0.weight", number=2))  # whose index is here
        data = bytearray(old.read_bytes())
        data[len(data) // 3] ^= 1
        old.write_bytes(data)
        (tmp_path / "device" / "weights").joinpath(min(p.name for p in old.parent.iterdir() if p != old)).unlink()
        task = rounds.next("unit1.weight", number=3)
        with pytest.raises(ProtocolError, match="sha256 is"):
            await downloads.weights(task)
        await downloads.weights(task)
        assert rounds.streams.asked[-1] == (task.weights_digest, [(0, task.weights_bytes)], True)

    run(rounds, tmp_path / "device", scene)


def test_weights_without_an_index_are_fetched_whole(rounds: Rounds, tmp_path: Path) -> None:
    async def scene(downloads: Downloads) -> None:
        await downloads.weights(rounds.next(number=1))
        task = replace(rounds.next("unit1.weight", number=2), index_digest="", index_bytes=0)
        await downloads.weights(task)
        assert rounds.sent(task)[0] == task.weights_bytes

    run(rounds, tmp_path / "device", scene)


@pytest.mark.parametrize("kind", ["folder", "fifo", "link to nowhere"])
@pytest.mark.parametrize("place", ["weights", "index", "another's partial", "partial", "final", "new index"])
def test_what_is_no_file_in_their_place_keeps_nobody_from_fetching(
    rounds: Rounds, tmp_path: Path, place: str, kind: str
) -> None:
    """After a disk was checked and repaired, or somebody has restored half of a folder."""

    async def scene(downloads: Downloads) -> None:
        await downloads.weights(rounds.next(number=1))
        old = await downloads.weights(rounds.next("unit0.weight", number=2))  # whose index is here
        task = rounds.next("unit1.weight", number=3)
        folder, indexes = old.parent, tmp_path / "device" / "indexes"
        path = {
            "weights": old,
            "index": indexes / f"{old.stem}.json",
            "another's partial": folder / "other.safetensors.partial",
            "partial": folder / f"{task.weights_digest}.safetensors.partial",
            "final": folder / f"{task.weights_digest}.safetensors",
            "new index": indexes / f"{task.weights_digest}.json",
        }[place]
        path.unlink(missing_ok=True)
        if kind == "folder":
            path.mkdir()
            (path / "inside").touch()
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to("nowhere")
        found = await downloads.weights(task)
        assert hashlib.sha256(found.read_bytes()).hexdigest() == task.weights_digest

    run(rounds, tmp_path / "device", scene)
