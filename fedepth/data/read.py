"""Samples of any supported source as batches in the form in which they are stored. numpy and PIL, no torch.

A batch is read when it is asked for: a data set never lies in memory as a whole, except the small set of digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedepth.data.decode import decode_image
from fedepth.data.digits import load_digits
from fedepth.data.idx import IdxFile, place_of_colours
from fedepth.data.idx_sets import find_idx
from fedepth.data.row_files import find_rows
from fedepth.data.rows import Rows
from fedepth.data.scan import check_labels, check_pair, find_folders
from fedepth.errors import DamagedFileError, DataError
from fedepth.task import InputType, ModelSpec

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

DIGITS = "digits"
_CHANNELS = (1, 3)


class Images(Protocol):
    """Labelled samples: images in the shape of a model's input, or what else a job trains on."""

    @property
    def labels(self) -> Labels:
        """The label of every image; shape (n,)."""

    def __len__(self) -> int: ...

    def read(self, indices: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The samples at `indices` (shape (k,)), as a fresh C-contiguous array (k, *spec.sample_shape) of the type
        `spec.sample_type`: images are (k, C, H, W) of bytes.

        Raises:
            DataError: an image cannot be read.
        """


def open_images(
    source: Path | str,
    spec: ModelSpec,
    split: str = "train",
    scratch: Path | None = None,
    damage: frozenset[int] = frozenset(),
    tokenizer: str = "",
) -> Images:
    """Opens a data directory (see fedepth.data.scan), or "digits" for the set that comes with scikit-learn; for a job
    with texts or a table a file with rows, or a folder of such files (fedepth.data.row_files).

    Images of another size are resized (bilinear; the digits bicubic), colours become gray or gray becomes
    RGB as `spec.input_shape` asks. Class folders are labelled by their place in `spec.classes`; IDX labels
    are such places, counted from `spec.first_label`.

    Args:
        source: the directory, or "digits"; a folder of that name needs its absolute path.
        spec: the model. Images are of shape (1 or 3, height, width); vectors, series and token ids are IDX files whose
            items have the model's input shape.
        split: "train" or "test".
        scratch: a folder on a disk, where gzipped files are decompressed to nameless ones, and rows are kept.
        damage: keys of image files to leave out (fedepth.data.damage). Damaged rows are left out in any case.
        tokenizer: contents of the job's tokenizer file, where it has one.

    Raises:
        DataError: the data cannot be used, or is not what the model takes.
    """
    if spec.columns is not None:
        return Rows(find_rows(Path(source), split), spec, scratch, tokenizer)
    shape = spec.input_shape
    if len(shape) != 3 or spec.input_type is not InputType.FLOAT:
        idx = None if str(source) == DIGITS else find_idx(Path(source), split)
        if idx is None:
            raise DataError(f"model {spec.name} takes inputs of shape {shape}; such data is read from IDX files only")
        return _open_items(*idx, spec, scratch)
    if shape[0] not in _CHANNELS or min(shape) < 1:
        raise DataError(f"model {spec.name} takes {shape}; images are read as (1 or 3, height, width)")
    if str(source) == DIGITS:
        images, labels = load_digits(split)
        check_labels(Path(DIGITS), np.unique(labels).tolist(), spec.classes)
        return _ArrayImages(lambda indices: images[indices], labels, shape, Image.Resampling.BICUBIC)
    directory = Path(source)
    idx = find_idx(directory, split)
    if idx is None:
        return _FileImages(find_folders(directory, spec.classes, split, damage), shape)
    return _open_idx(*idx, spec, scratch)


class _ArrayImages:
    """Images of one size, fetched by index as (k, h, w) or (k, h, w, 3)."""

    def __init__(
        self,
        fetch: Callable[[npt.NDArray[Any]], Bytes],
        labels: Labels,
        shape: tuple[int, ...],
        resampling: Image.Resampling,
    ) -> None:
        self.labels = labels
        self._fetch = fetch
        self._shape = shape
        self._resampling = resampling

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: npt.NDArray[Any]) -> Bytes:
        fetched = self._fetch(indices)
        batch = np.empty((len(fetched), *self._shape), np.uint8)
        is_gray = fetched.ndim == 3
        if fetched.shape[1:3] == self._shape[1:] and (is_gray or self._shape[0] == 3):
            batch[:] = fetched[:, None] if is_gray else fetched.transpose(0, 3, 1, 2)
            return batch
        for place, pixels in enumerate(fetched):
            image = _resized(Image.fromarray(pixels), self._shape, self._resampling)
            image = image if is_gray or self._shape[0] == 3 else image.convert("L")
            batch[place] = np.asarray(image) if image.mode == "L" else np.asarray(image).transpose(2, 0, 1)
        return batch


class _FileImages:
    """One image file per sample, in one folder per class."""

    def __init__(self, files: dict[str, list[Path]], shape: tuple[int, ...]) -> None:
        counts = [len(paths) for paths in files.values()]
        self.labels: Labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        self._files = [path for paths in files.values() for path in paths]
        self._shape = shape

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: npt.NDArray[Any]) -> Bytes:
        batch = np.empty((len(indices), *self._shape), np.uint8)
        for place, index in enumerate(indices.tolist()):
            batch[place] = decode_image(self._files[index], self._shape)
        return batch


def _open_idx(images_path: Path, labels_path: Path, spec: ModelSpec, scratch: Path | None) -> Images:
    images = IdxFile(images_path, None, scratch)
    colours = place_of_colours(images)
    labels = _labels(labels_path, images, spec)

    def fetch(indices: npt.NDArray[Any]) -> Bytes:
        data = images.read_items(indices.tolist())
        pixels = np.frombuffer(data, np.uint8).reshape(-1, *images.shape[1:])
        if colours is None:
            return pixels
        last = np.ascontiguousarray(np.moveaxis(pixels, colours, 3))
        return last[..., 0] if last.shape[3] == 1 else last

    return _ArrayImages(fetch, labels, spec.input_shape, Image.Resampling.BILINEAR)


def _labels(path: Path, items: IdxFile, spec: ModelSpec) -> Labels:
    """The labels of items, as places in the job's classes."""
    file = IdxFile(path, 1, any_integers=True)
    check_pair(items, file)
    labels = np.frombuffer(b"".join(file.pieces()), file.dtype).astype(np.int64)
    check_labels(path, np.unique(labels).tolist(), spec.classes, spec.first_label)
    return labels - spec.first_label


class _Items:
    """Items of an IDX file as they are: vectors, series, token ids."""

    def __init__(self, items: IdxFile, labels: Labels) -> None:
        self.labels = labels
        self._items = items

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: npt.NDArray[Any]) -> Bytes:
        data = self._items.read_items(indices.tolist())
        return np.frombuffer(data, np.uint8).reshape(-1, *self._items.shape[1:]).copy()


def _open_items(items_path: Path, labels_path: Path, spec: ModelSpec, scratch: Path | None) -> Images:
    items = IdxFile(items_path, None, scratch)
    labels = _labels(labels_path, items, spec)
    if items.shape[1:] != tuple(spec.input_shape):
        raise DataError(f"{items_path} holds items of shape {items.shape[1:]}, the model takes {spec.input_shape}")
    return _Items(items, labels)


def read_sound(
    images: Images, indices: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], list[DamagedFileError]]:
    """The images that can be read of those at `indices`, which of these they are, and what is wrong with the rest."""
    try:
        return images.read(indices), indices, []
    except DamagedFileError:
        pass
    damaged: list[DamagedFileError] = []
    sound: list[npt.NDArray[Any]] = []
    kept: list[int] = []
    for index in indices.tolist():
        try:
            sound.append(images.read(np.array([index])))
        except DamagedFileError as error:
            damaged.append(error)
        else:
            kept.append(index)
    empty = np.empty((0,), indices.dtype)
    return np.concatenate(sound) if sound else np.empty((0,), np.uint8), np.array(kept) if kept else empty, damaged


def _resized(image: Image.Image, shape: Sequence[int], resampling: Image.Resampling) -> Image.Image:
    size = (shape[2], shape[1])
    return image if image.size == size else image.resize(size, resampling)
