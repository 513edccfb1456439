"""Cached inputs come back as they were written, from RAM and from disk."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.errors import DiskError, StateError
from fedepth.plan import CachePlace, CacheType
from fedepth.training.cache import RowFormat, filling_order, open_cache
from tests.training.open_files import open_files


@pytest.mark.parametrize("place", CachePlace)
@pytest.mark.parametrize(
    ("kind", "dtype"), [(None, torch.uint8), (CacheType.FLOAT32, torch.float32), (CacheType.FLOAT16, torch.float32)]
)
def test_what_is_written_is_read(place: CachePlace, kind: CacheType | None, dtype: torch.dtype, tmp_path: Path) -> None:
    samples = (torch.arange(10 * 2 * 3) % 251).view(10, 2, 3).to(dtype)
    cache = open_cache(place, tmp_path, 10, RowFormat((2, 3), kind))
    cache.write(0, samples[:4])
    cache.write(4, samples[4:])
    order = torch.tensor([9, 0, 4, 4])
    assert torch.equal(cache.read(order), samples[order])
    assert list(tmp_path.iterdir()) == []  # the file has no name that a killed process could leave behind
    cache.close()


def test_a_row_that_was_never_written_is_an_error(tmp_path: Path) -> None:
    cache = open_cache(CachePlace.DISK, tmp_path, 4, RowFormat((2,), CacheType.FLOAT32))
    cache.write(0, torch.zeros(2, 2))
    with pytest.raises(StateError, match="0 of 8 bytes at row 3"):
        cache.read(torch.tensor([3]))
    cache.close()


@settings(deadline=None)  # files, on a disk that others use too
@given(
    count=st.integers(1, 40),
    batch=st.integers(1, 50),
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    kinds=st.lists(st.sampled_from(CacheType), min_size=4, max_size=4),
)
def test_caches_that_take_over_one_file_lose_no_row(
    tmp_path_factory: pytest.TempPathFactory, count: int, batch: int, widths: list[int], kinds: list[CacheType]
) -> None:
    folder = tmp_path_factory.mktemp("caches")
    numbers = torch.arange(count, dtype=torch.float32).view(count, 1)  # each row holds its own number, exactly
    source = None
    for width, kind in zip(widths, kinds, strict=False):
        cache = open_cache(CachePlace.DISK, folder, count, RowFormat((width,), kind), source)
        for positions in filling_order(count, batch, cache.rows, source):
            held = numbers[positions] if source is None else source.read(torch.tensor(positions))
            assert torch.equal(held, numbers[positions].expand_as(held))
            cache.write(positions.start, held[:, :1].expand(-1, width))
        if source:
            source.close()
        source = cache
    assert source is not None
    assert torch.equal(source.read(torch.arange(count)), numbers.expand(-1, widths[-1]))
    source.close()


def test_a_taken_over_file_is_as_large_as_its_largest_cache(tmp_path: Path) -> None:
    large, small = (RowFormat((width,), CacheType.FLOAT32) for width in (5, 2))
    first = open_cache(CachePlace.DISK, tmp_path, 10, large)
    first.write(0, torch.zeros(10, 5))
    second = open_cache(CachePlace.DISK, tmp_path, 10, small, first)
    first.close()
    second.write(0, torch.ones(10, 2))
    assert torch.equal(second.read(torch.arange(10)), torch.ones(10, 2))
    assert [path.stat().st_size for path in open_files(tmp_path)] == [10 * 5 * 4]
    second.close()
    assert open_files(tmp_path) == []


def test_a_cache_that_the_disk_has_no_room_for_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    samples = free.f_blocks * free.f_frsize // 4_000_000 + 1
    with pytest.raises(
        DiskError, match=f"cached inputs of {samples} samples need another .* is free; free some space"
    ) as caught:
        open_cache(CachePlace.DISK, tmp_path, samples, RowFormat((1_000_000,), CacheType.FLOAT32))
    assert caught.value.needed_bytes == samples * 4_000_000
    assert open_files(tmp_path) == []


def test_a_byte_per_value_keeps_256_even_steps_between_the_extremes() -> None:
    sample = torch.tensor([[-1.0, 0.0, 0.5, 1.55]])  # steps of 0.01: levels 0, 100, 150, 255
    form = RowFormat((4,), CacheType.UINT8)
    rows = form.encode(sample)
    assert rows.dtype == torch.uint8 and rows.shape == (1, form.row_bytes) == (1, 12)
    assert rows[0, 8:].tolist() == [0, 100, 150, 255]
    torch.testing.assert_close(form.decode(rows), sample)


def test_a_constant_sample_survives_a_byte_per_value() -> None:
    sample = torch.full((2, 3), 0.25)
    form = RowFormat((3,), CacheType.UINT8)
    assert torch.equal(form.decode(form.encode(sample)), sample)


@pytest.mark.parametrize("kind", CacheType)
def test_a_row_takes_what_it_is_said_to_take(kind: CacheType) -> None:
    form = RowFormat((2, 3), kind)
    assert form.encode(torch.zeros(5, 2, 3)).shape == (5, form.row_bytes)


@pytest.mark.parametrize("kind", CacheType)
def test_maps_stay_in_their_memory_format(kind: CacheType) -> None:
    maps = (
        torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    )
    form = RowFormat((3, 4, 5), kind, channels_last=True)
    rows = form.encode(maps)
    assert rows.shape == (2, form.row_bytes)
    if kind is CacheType.FLOAT32:
        assert rows.data_ptr() == maps.data_ptr()  # nothing was copied
    back = form.decode(rows)
    assert back.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(back, maps, rtol=0, atol=0.5 * 59 / 255 if kind is CacheType.UINT8 else 0)
