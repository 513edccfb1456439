"""Cached inputs come back as they were written, from RAM and from disk."""

from pathlib import Path

import pytest
import torch

from fedepth.task import CachePlace, CacheType
from fedepth.training.cache import RowFormat, open_cache


@pytest.mark.parametrize("place", CachePlace)
@pytest.mark.parametrize(
    ("kind", "dtype"), [(None, torch.uint8), (CacheType.FLOAT32, torch.float32), (CacheType.FLOAT16, torch.float32)]
)
def test_what_is_written_is_read(place: CachePlace, kind: CacheType | None, dtype: torch.dtype, tmp_path: Path) -> None:
    samples = (torch.arange(10 * 2 * 3) % 251).view(10, 2, 3).to(dtype)
    cache = open_cache(place, tmp_path / "inputs-0", 10, RowFormat((2, 3), kind))
    cache.write(0, samples[:4])
    cache.write(4, samples[4:])
    order = torch.tensor([9, 0, 4, 4])
    assert torch.equal(cache.read(order), samples[order])
    cache.close()
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_was_never_written_is_an_error(tmp_path: Path) -> None:
    cache = open_cache(CachePlace.DISK, tmp_path / "inputs-0", 4, RowFormat((2,), CacheType.FLOAT32))
    cache.write(0, torch.zeros(2, 2))
    with pytest.raises(OSError, match="0 of 8 bytes at row 3"):
        cache.read(torch.tensor([3]))
    cache.close()


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
