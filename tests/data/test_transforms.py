"""Normalisation and random views."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fedepth.data.transforms import _drawn, augment, normalise, views_key
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


def test_no_augmentation_changes_nothing() -> None:
    images = batch(3)
    assert augment(images, "none", 1, np.arange(3)) is images


def test_an_unknown_augmentation_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="'mixup': there are none, crop-flip"):
        augment(batch(1), "mixup", 1, np.arange(1))


def test_views_are_of_images() -> None:
    with pytest.raises(ConfigError, match=r"'crop-flip' is for images \(channels, height, width\), not for \(64,\)"):
        augment(np.zeros((3, 64), np.uint8), "crop-flip", 1, np.arange(3))


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
    views = augment(np.repeat(image[None], 2000, 0), "crop-flip", 2, np.arange(2000))
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
    views = augment(images, "crop-flip", 3, np.arange(40))
    assert (images == before).all()
    chosen = {possible_views(image)[view.tobytes()] for image, view in zip(images, views, strict=True)}
    assert len(chosen) > 20


def test_corners_and_flips_are_drawn_evenly() -> None:
    image = batch(1)[0]
    possible = possible_views(image)
    count = 16_200  # a hundred of each of the 162 views
    views = augment(np.repeat(image[None], count, 0), "crop-flip", views_key(1, 2, "d"), np.arange(count))
    seen = Counter(possible[view.tobytes()] for view in views)
    chi_square = sum((times - 100) ** 2 / 100 for times in seen.values())
    assert 100 < chi_square < 235  # 161 ± 4 standard deviations of 18


def test_the_bits_are_those_of_splitmix64() -> None:
    """The first outputs for the seed 1234567, as in the reference implementation (Vigna, splitmix64.c)."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert _drawn(1234567, np.arange(3)).tolist() == expected


def test_views_do_not_depend_on_how_the_images_are_cut_into_batches_or_ordered() -> None:
    images, key = batch(10), views_key(1, 2, "d")
    whole = augment(images, "crop-flip", key, np.arange(10))
    order = np.array([7, 2, 9, 0, 4, 1, 3, 8, 6, 5])
    pieces = [augment(images[piece], "crop-flip", key, piece) for piece in np.split(order, [3, 4])]
    assert (np.concatenate(pieces) == whole[order]).all()


def test_views_are_the_same_for_an_epoch_and_new_for_another_epoch_round_device_or_seed() -> None:
    keys = [
        views_key(1, 2, "device"),
        views_key(1, 2, "device", 1),
        views_key(1, 3, "device"),
        views_key(1, 2, "other"),
        views_key(2, 2, "device"),
        views_key(-1, 2, "device"),
    ]
    assert views_key(1, 2, "device", 0) == keys[0]
    assert len(set(keys)) == 6
    assert all(0 <= key < 1 << 64 for key in keys)
    assert augment(batch(1), "crop-flip", (1 << 64) - 1, np.array([(1 << 62) + 1])).shape == (1, 2, 8, 8)
