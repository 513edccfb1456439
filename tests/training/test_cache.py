"""Cached inputs come back as they were written, from RAM and from disk."""

from pathlib import Path

import pytest
import torch

from fedepth.task import CachePlace
from fedepth.training.cache import open_cache


@pytest.mark.parametrize("place", CachePlace)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_what_is_written_is_read(place: CachePlace, dtype: torch.dtype, tmp_path: Path) -> None:
    samples = (torch.arange(10 * 2 * 3) % 251).view(10, 2, 3).to(dtype)
    cache = open_cache(place, tmp_path / "inputs-0", 10, (2, 3), dtype)
    cache.write(0, samples[:4])
    cache.write(4, samples[4:])
    order = torch.tensor([9, 0, 4, 4])
    assert torch.equal(cache.read(order), samples[order])
    cache.close()
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_was_never_written_is_an_error(tmp_path: Path) -> None:
    cache = open_cache(CachePlace.DISK, tmp_path / "inputs-0", 4, (2,), torch.float32)
    cache.write(0, torch.zeros(2, 2))
    with pytest.raises(OSError, match="0 of 8 bytes at row 3"):
        cache.read(torch.tensor([3]))
    cache.close()
