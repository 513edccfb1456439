"""Normalisation and random views."""

from __future__ import annotations

import numpy as np
import pytest

from fedepth.data.transforms import augment, normalise, views_rng
from fedepth.errors import ConfigError, DataError
from fedepth.task import ModelSpec

SPEC = ModelSpec("m", ("a",), (2, 2, 2), (0.5, 0.2), (0.25, 0.1))


def batch(count: int, size: int = 8, channels: int = 2) -> np.ndarray:
    return np.random.default_rng(5).integers(1, 256, (count, channels, size, size)).astype(np.uint8)


def test_normalise_subtracts_the_mean_and_divides_by_the_deviation_of_each_channel() -> None:
    pixels = np.zeros((1, 2, 2, 2), np.uint8)
    pixels[0, 0, 0, 0] = pixels[0, 1, 1, 1] = 255
    result = normalise(pixels, SPEC)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[0, 0], [[2, -2], [-2, -2]], rtol=1e-6)
    np.testing.assert_allclose(result[0, 1], [[-2, -2], [-2, 8]], rtol=1e-6)
    assert pixels.max() == 255


def test_normalise_refuses_another_shape() -> None:
    with pytest.raises(DataError, match=r"\(2, 3, 2\) for model m, which takes \(2, 2, 2\)"):
        normalise(np.zeros((1, 2, 3, 2), np.uint8), SPEC)


def test_no_augmentation_changes_nothing_and_draws_nothing() -> None:
    rng = np.random.default_rng(1)
    images = batch(3)
    assert augment(images, "none", rng) is images
    assert rng.random() == np.random.default_rng(1).random()


def test_an_unknown_augmentation_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="'mixup': there are none, crop-flip"):
        augment(batch(1), "mixup", np.random.default_rng(1))


def possible_views(image: np.ndarray) -> dict[bytes, tuple[int, int, bool]]:
    size = image.shape[1]
    padded = np.pad(image, ((0, 0), (4, 4), (4, 4)))
    return {
        (view[:, :, ::-1] if flip else view).tobytes(): (top, left, flip)
        for top in range(9)
        for left in range(9)
        for flip in (False, True)
        for view in [padded[:, top : top + size, left : left + size]]
    }


def test_every_view_is_a_shifted_and_perhaps_flipped_image_and_every_one_occurs() -> None:
    image = batch(1)[0]
    views = augment(np.repeat(image[None], 2000, 0), "crop-flip", np.random.default_rng(2))
    assert views.dtype == np.uint8
    assert views.flags.c_contiguous
    possible = possible_views(image)
    assert len(possible) == 162
    seen = [possible[view.tobytes()] for view in views]
    assert set(seen) == set(possible.values())
    assert 900 < sum(flip for _, _, flip in seen) < 1100


def test_each_image_has_its_own_view_and_the_originals_stay() -> None:
    images = batch(40)
    before = images.copy()
    views = augment(images, "crop-flip", np.random.default_rng(3))
    assert (images == before).all()
    chosen = {possible_views(image)[view.tobytes()] for image, view in zip(images, views, strict=True)}
    assert len(chosen) > 20


def test_views_do_not_depend_on_how_the_images_are_cut_into_batches() -> None:
    images = batch(10)
    whole = augment(images, "crop-flip", views_rng(1, 2, "d"))
    rng = views_rng(1, 2, "d")
    pieces = [augment(images[begin : begin + 3], "crop-flip", rng) for begin in range(0, 10, 3)]
    assert (np.concatenate(pieces) == whole).all()


def test_views_are_the_same_for_a_task_and_new_for_another_round_device_or_seed() -> None:
    first = views_rng(1, 2, "device").random(4).tolist()
    assert views_rng(1, 2, "device").random(4).tolist() == first
    others = [
        views_rng(1, 3, "device"),
        views_rng(1, 2, "other"),
        views_rng(2, 2, "device"),
        views_rng(-1, 2, "device"),
    ]
    draws = {tuple(rng.random(4).tolist()) for rng in others}
    assert len(draws | {tuple(first)}) == 5
