"""Images of every source, in the model's shape."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fedepth.data.digits import load_digits
from fedepth.data.idx import write_idx
from fedepth.data.read import open_images
from fedepth.errors import DataError
from fedepth.task import InputType, ModelSpec


def spec(shape: tuple[int, ...] = (1, 4, 4), classes: tuple[str, ...] = ("a", "b", "c")) -> ModelSpec:
    return ModelSpec("m", classes, shape, (0.5,) * shape[0], (0.5,) * shape[0])


def put_idx(directory: Path, images: np.ndarray, labels: list[int], end: str = "") -> None:
    write_idx(directory / f"train-images-idx3-ubyte{end}", images)
    write_idx(directory / f"train-labels-idx1-ubyte{end}", np.array(labels, np.uint8))


def put_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_images_of_the_right_size_come_unchanged(tmp_path: Path, end: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (5, 4, 4)).astype(np.uint8)
    put_idx(tmp_path, pixels, [2, 0, 1, 1, 2], end)
    images = open_images(tmp_path, spec())
    assert len(images) == 5
    assert images.labels.dtype == np.int64
    assert images.labels.tolist() == [2, 0, 1, 1, 2]
    batch = images.read(np.array([3, 0, 3]))
    assert batch.dtype == np.uint8
    assert batch.flags.c_contiguous and batch.flags.writeable
    assert batch.tolist() == pixels[[3, 0, 3]][:, None].tolist()


def test_gray_images_become_three_equal_channels(tmp_path: Path) -> None:
    pixels = np.arange(32, dtype=np.uint8).reshape(2, 4, 4)
    put_idx(tmp_path, pixels, [0, 1])
    batch = open_images(tmp_path, spec((3, 4, 4))).read(np.array([1]))
    assert batch.shape == (1, 3, 4, 4)
    assert all(batch[0, channel].tolist() == pixels[1].tolist() for channel in range(3))


def test_idx_images_of_another_size_are_resized_bilinear(tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (1, 4, 6)).astype(np.uint8)
    put_idx(tmp_path, pixels, [0])
    batch = open_images(tmp_path, spec((1, 8, 5))).read(np.array([0]))
    expected = np.asarray(Image.fromarray(pixels[0]).resize((5, 8), Image.Resampling.BILINEAR))
    assert batch[0, 0].tolist() == expected.tolist()


def test_folders_are_labelled_by_their_place_among_the_classes(tmp_path: Path) -> None:
    for name, value in (("b", 20), ("c", 30)):
        for number in (1, 0):
            put_image(tmp_path / name / f"{number}.png", np.full((4, 4), value + number, np.uint8))
    images = open_images(tmp_path, spec(classes=("c", "a", "b")))
    assert images.labels.dtype == np.int64
    assert images.labels.tolist() == [0, 0, 2, 2]
    assert images.read(np.arange(4))[:, 0, 0, 0].tolist() == [30, 31, 20, 21]


def test_colours_keep_their_channels_in_the_order_red_green_blue(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:, :] = (10, 20, 30)
    pixels[0, 3] = (40, 50, 60)
    put_image(tmp_path / "a" / "0.png", pixels)
    batch = open_images(tmp_path, spec((3, 4, 4))).read(np.array([0]))
    assert batch.flags.c_contiguous
    assert batch[0, :, 1, 1].tolist() == [10, 20, 30]
    assert batch[0, :, 0, 3].tolist() == [40, 50, 60]


def test_colours_become_gray_by_luma(tmp_path: Path) -> None:
    put_image(tmp_path / "a" / "0.png", np.full((4, 4, 3), (255, 0, 0), np.uint8))
    assert open_images(tmp_path, spec()).read(np.array([0])).ravel().tolist() == [76] * 16  # 0.299 · 255


def test_images_with_a_palette_or_transparency_are_converted(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("P", (4, 4), 0).save(tmp_path / "a" / "0.png")
    Image.new("RGBA", (4, 4), (9, 8, 7, 0)).save(tmp_path / "a" / "1.png")
    batch = open_images(tmp_path, spec((3, 4, 4))).read(np.array([0, 1]))
    assert batch[1, :, 0, 0].tolist() == [255, 255, 255]  # what is fully transparent shows the white ground


def test_files_of_another_size_are_resized_bilinear(tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (9, 6, 3)).astype(np.uint8)
    put_image(tmp_path / "a" / "0.png", pixels)
    batch = open_images(tmp_path, spec((3, 4, 8))).read(np.array([0]))
    expected = np.asarray(Image.fromarray(pixels).resize((8, 4), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert batch[0].tolist() == expected.tolist()


def test_a_large_jpeg_is_decoded_near_its_final_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_image(tmp_path / "a" / "0.jpg", np.full((512, 512, 3), 200, np.uint8))
    sizes: list[tuple[int, int]] = []
    real = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *rest: (sizes.append(self.size), real(self, *rest))[1])
    batch = open_images(tmp_path, spec((3, 64, 64))).read(np.array([0]))
    assert sizes in ([], [(64, 64)])
    assert np.abs(batch.astype(int) - 200).max() <= 2


def test_an_image_that_does_not_fit_into_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_image(tmp_path / "a" / "0.png", np.zeros((30, 40, 3), np.uint8))

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", full)
    images = open_images(tmp_path, spec((3, 4, 8)))
    with pytest.raises(DataError, match=r"0\.png takes more memory .*scale it down towards 8×4 pixels, or save it as"):
        images.read(np.array([0]))


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png cannot be read as an image"):
        open_images(tmp_path, spec()).read(np.array([0]))


def test_an_image_that_is_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a" / "cut.png"
    put_image(path, np.random.default_rng(4).integers(0, 256, (40, 40)).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"cut\.png cannot be read"):
        open_images(tmp_path, spec((1, 40, 40))).read(np.array([0]))


def test_labels_outside_the_classes_are_refused(tmp_path: Path) -> None:
    put_idx(tmp_path, np.zeros((2, 4, 4), np.uint8), [0, 3])
    with pytest.raises(DataError, match="has labels 3"):
        open_images(tmp_path, spec())


def test_counts_that_differ_are_refused(tmp_path: Path) -> None:
    put_idx(tmp_path, np.zeros((2, 4, 4), np.uint8), [0])
    with pytest.raises(DataError, match="2 images"):
        open_images(tmp_path, spec())


@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 0, 4)])
def test_a_model_that_takes_no_images_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    put_idx(tmp_path, np.zeros((1, 4, 4), np.uint8), [0])
    with pytest.raises(DataError, match="images are read as"):
        open_images(tmp_path, spec(shape))


def test_series_and_token_ids_are_items_of_idx_files_as_they_are(tmp_path: Path) -> None:
    series = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    put_idx(tmp_path, series, [0, 1, 2])
    items = open_images(tmp_path, spec((4, 5)))
    assert np.array_equal(items.read(np.array([2, 0])), series[[2, 0]])
    assert items.labels.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"items of shape \(4, 5\), the model takes \(4, 6\)"):
        open_images(tmp_path, spec((4, 6)))
    tokens = replace(spec((1, 4, 5)), input_type=InputType.TOKENS)
    with pytest.raises(DataError, match=r"the model takes \(1, 4, 5\)"):
        open_images(tmp_path, tokens)


def test_class_folders_hold_images_only(tmp_path: Path) -> None:
    put_image(tmp_path / "a" / "0.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match="IDX files only"):
        open_images(tmp_path, spec((16,)))


def test_the_splits_of_the_digits_are_stratified_and_share_no_sample() -> None:
    from sklearn import datasets

    bunch = datasets.load_digits()
    train, test = load_digits("train"), load_digits("test")
    assert (len(train[1]), len(test[1])) == (1438, 359)
    assert np.bincount(test[1]).tolist() == [round(count * 0.2) for count in np.bincount(bunch.target)]
    together = sorted(image.tobytes() for image in np.concatenate([train[0], test[0]]))
    assert together == sorted(np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in bunch.images)


def test_the_split_of_the_digits_never_changes() -> None:
    images, labels = load_digits("test")
    assert labels[:12].tolist() == [6, 8, 9, 0, 4, 8, 9, 0, 9, 1, 5, 2]
    assert sha256(images.tobytes()).hexdigest().startswith("132b45157d04dbae")


def test_digits_are_scaled_bicubic_to_the_models_shape() -> None:
    images = open_images("digits", spec((3, 16, 12), tuple("0123456789")), "test")
    pixels, labels = load_digits("test")
    assert images.labels.tolist() == labels.tolist()
    batch = images.read(np.array([7]))
    expected = np.asarray(Image.fromarray(pixels[7]).resize((12, 16), Image.Resampling.BICUBIC))
    assert batch.shape == (1, 3, 16, 12)
    assert batch[0, 2].tolist() == expected.tolist()


def test_digits_need_ten_classes_and_a_known_split() -> None:
    with pytest.raises(DataError, match="labels 3, 4, 5, 6, 7, 8, 9"):
        open_images("digits", spec((1, 8, 8)))
    with pytest.raises(DataError, match="no split 'dev'"):
        open_images("digits", spec((1, 8, 8), tuple("0123456789")), "dev")


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DataError, match=r"install fedepth\[demo\]"):
        load_digits("train")


def test_reading_files_loads_neither_torch_nor_scikit_learn(tmp_path: Path) -> None:
    put_idx(tmp_path, np.zeros((1, 4, 4), np.uint8), [0])
    code = (
        "import sys; import numpy as np; from fedepth.data.read import open_images; "
        "from fedepth.task import InputType, ModelSpec; "
        "open_images(sys.argv[1], ModelSpec('m', ('a',), (3, 8, 8), (0.,), (1.,))).read(np.array([0])); "
        "sys.exit(' '.join({'torch', 'torchvision', 'sklearn', 'scipy'} & set(sys.modules)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
