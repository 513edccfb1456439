"""What people call their classes, and how they lay out IDX files.

A further case is a row of one of the tables.
"""

from __future__ import annotations

import difflib
import gzip
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedepth.data.idx_sets import find_idx
from fedepth.data.labels import by_class, lacking, unknown_names
from fedepth.data.read import open_images
from fedepth.data.scan import scan
from fedepth.errors import DataError
from fedepth.printable import visible
from fedepth.task import ModelSpec

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def put_images(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("L", (2, 2)).save(root / name / "1.png")
    return root


def idx(kind: int, shape: tuple[int, ...], data: bytes) -> bytes:
    return struct.pack(f">HBB{len(shape)}I", 0, kind, len(shape), *shape) + data


def put_idx(root: Path, images: str, labels: str, values: list[int], kind: int = 8) -> Path:
    """`values` are the labels; images are of 2×2 pixels that hold the same."""
    width = {8: "B", 9: "b", 11: "h", 12: "i"}[kind]
    count = len(values)
    for name, data in (
        (images, idx(8, (count, 2, 2), bytes(max(0, value) % 256 for value in values for _ in range(4)))),
        (labels, idx(kind, (count,), struct.pack(f">{count}{width}", *values))),
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data, mtime=0) if name.lower().endswith(".gz") else data)
    return root


# the job's class, the folder's name: one class
SAME = [
    (COMPOSED, DECOMPOSED),
    (DECOMPOSED, COMPOSED),
    ("각", "\u1100\u1161\u11a8"),
    ("Å", "\u212b"),
    ("with space", "with space"),
    ("猫", "猫"),
]


@pytest.mark.parametrize(("job", "folder"), SAME)
def test_names_are_compared_after_normalisation(tmp_path: Path, job: str, folder: str) -> None:
    put_images(tmp_path, folder)
    assert scan(tmp_path, ("other", job)).class_counts == (0, 1)
    spec = ModelSpec("m", ("other", job), (1, 2, 2), (0.0,), (1.0,))
    assert open_images(tmp_path, spec).labels.tolist() == [1]


def test_folders_that_are_equal_by_then_are_one_class_and_that_is_said(tmp_path: Path) -> None:
    put_images(tmp_path, COMPOSED, DECOMPOSED)
    summary = scan(tmp_path, None)
    assert (summary.classes, summary.class_counts) == ((COMPOSED,), (2,))
    (note,) = summary.notes
    assert "count as one class: their names differ only in how Unicode writes them" in note


# folder, classes of the job, what is said
NEAR = [
    ("Cat", ("cat", "dog"), "folder 'Cat' - did you mean class 'cat'?"),
    ("cat ", ("cat", "dog"), "folder 'cat ' - did you mean class 'cat'?"),
    ("cat\u00a0", ("cat", "dog"), r"folder 'cat\xa0' - did you mean class 'cat'?"),
    ("cat\u200b", ("cat", "dog"), r"folder 'cat\u200b' - did you mean class 'cat'?"),
    ("cat\u200d", ("cat", "dog"), r"folder 'cat\u200d' - did you mean class 'cat'?"),
    ("cat\ufe0f", ("cat", "dog"), r"folder 'cat\ufe0f' - did you mean class 'cat'?"),
    ("\u202ecat", ("cat", "dog"), r"folder '\u202ecat' - did you mean class 'cat'?"),
    ("\ufeffcat", ("cat", "dog"), r"folder '\ufeffcat' - did you mean class 'cat'?"),
    ("cat\n", ("cat", "dog"), r"folder 'cat\n' - did you mean class 'cat'?"),
    ("ｃａｔ", ("cat", "dog"), "folder 'ｃａｔ' - did you mean class 'cat'"),
    ("t_shirt", ("t-shirt", "dog"), "folder 't_shirt' - did you mean class 't-shirt'?"),
    ("aeroplane", ("airplane", "dog"), "folder 'aeroplane' - did you mean class 'airplane'?"),
    ("c\u0430t", ("cat", "dog"), "U+0061 LATIN SMALL LETTER A in place of U+0430 CYRILLIC SMALL LETTER A"),
    ("zebra", ("cat", "dog"), "1 folder that is not a class of the job ('cat', 'dog'): folder 'zebra'"),
    ("cafe", (COMPOSED, "dog"), "folder 'cafe' - did you mean class 'café'?"),
]


@pytest.mark.parametrize(("folder", "classes", "said"), NEAR)
def test_a_near_miss_is_shown_with_what_was_meant(
    tmp_path: Path, folder: str, classes: tuple[str, ...], said: str
) -> None:
    put_images(tmp_path, folder, classes[1])
    with pytest.raises(DataError) as caught:
        scan(tmp_path, classes)
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


def test_many_unknown_names_are_cut() -> None:
    told = unknown_names([f"{'x' * 200}{number}" for number in range(500)], ("a",) * 2000)
    assert "500 folders that are not classes of the job" in told
    assert told.endswith("and 490 more")
    assert len(told) < 2000
    hostile = unknown_names(["\U000e0100" * 200] * 20, ("\U000e0100" * 200, "b"))
    assert len(hostile) <= 2001


def test_names_are_compared_with_classes_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device may send any names, again and again, and the coordinator compares them between its other work."""
    compared: list[int] = []
    matches = difflib.get_close_matches

    def counted(word: str, possible: Sequence[str], n: int = 3, cutoff: float = 0.6) -> list[str]:
        compared.append(len(possible))
        return matches(word, possible, n, cutoff)

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    told = unknown_names([f"class 1{letter}" for letter in "abcdefgh"], [f"class {number}" for number in range(200)])
    assert compared == [200] * 5  # a thousand pairs
    assert told.count("did you mean") == 5
    thousand, more = ([f"class {number}" for number in range(count)] for count in (1000, 1001))
    assert unknown_names(["clas 7", "clas 8"], thousand).count("did you mean") == 1
    assert "did you mean" not in unknown_names(["clas 7"], more)
    assert len(compared) == 6
    assert unknown_names([f"Class-{letter}" for letter in range(10)], more).count("did you mean") == 10


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "'a b'"),
        ("a\t", r"'a\t'"),
        ("a\u3164", r"'a\u3164'"),
        ("👩‍🚀", r"'👩\u200d🚀'"),
        ("x" * 300, f"'{'x' * 200}…'"),
    ],
)
def test_what_cannot_be_seen_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_classes_that_a_device_lacks_are_named() -> None:
    assert lacking(("a", "b", "c"), (1, 0, 0)) == ("b", "c")
    assert by_class((DECOMPOSED, "b"), (3, 2), ("b", "a", COMPOSED), 0) == (2, 0, 3)
    assert by_class((), (0, 5), ("a", "b", "c"), 1) == (5, 0, 0)


# --- IDX

# what it is: names of images and labels
LAYOUTS = {
    "torchvision": ("MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/train-labels-idx1-ubyte"),
    "with dots": ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
    "gzipped": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "one of them gzipped": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"),
    "dots and gzipped": ("train-images.idx3-ubyte.gz", "train-labels.idx1-ubyte.gz"),
    "EMNIST": ("emnist-letters-train-images-idx3-ubyte", "emnist-letters-train-labels-idx1-ubyte"),
    "EMNIST below": ("gzip/emnist-digits-train-images-idx3-ubyte.gz", "gzip/emnist-digits-train-labels-idx1-ubyte.gz"),
    "capitals": ("Train-Images-idx3-ubyte", "Train-Labels-idx1-ubyte"),
    "gzipped in capitals": ("TRAIN-IMAGES-IDX3-UBYTE.GZ", "TRAIN-LABELS-IDX1-UBYTE.GZ"),
    "beside its test split": ("MNIST/train/train-images-idx3-ubyte", "MNIST/train/train-labels-idx1-ubyte"),
    "a folder": ("fashion/train-images-idx3-ubyte", "fashion/train-labels-idx1-ubyte"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_idx_files_are_found_under_the_names_that_people_have(tmp_path: Path, case: str) -> None:
    put_idx(tmp_path, *LAYOUTS[case], [1, 0, 1])
    if case == "beside its test split":
        images_name, labels_name = (name.replace("train", "test") for name in LAYOUTS[case])
        put_idx(tmp_path, images_name, labels_name, [1])
    summary = scan(tmp_path, ("a", "b"))
    assert (summary.layout, summary.class_counts) == ("idx", (1, 2))
    images = open_images(tmp_path, ModelSpec("m", ("a", "b"), (1, 2, 2), (0.0,), (1.0,)))
    assert images.read(np.array([0, 1]))[:, 0, 0, 0].tolist() == [1, 0]


@pytest.mark.parametrize(("end", "zipped"), [("", True), (".gz", False), (".GZ", False)])
def test_whether_a_file_is_gzipped_is_seen_in_it(tmp_path: Path, end: str, zipped: bool) -> None:
    """A browser may have unpacked what it stored, and a tool dropped the suffix."""
    for name, data in (("images-idx3", idx(8, (2, 2, 2), bytes(8))), ("labels-idx1", idx(8, (2,), b"\0\1"))):
        (tmp_path / f"train-{name}-ubyte{end}").write_bytes(gzip.compress(data) if zipped else data)
    assert scan(tmp_path, ("a", "b")).class_counts == (1, 1)
    images = open_images(tmp_path, ModelSpec("m", ("a", "b"), (1, 2, 2), (0.0,), (1.0,)))
    assert images.read(np.array([1])).tolist() == [[[[0, 0], [0, 0]]]]


# the shape of an IDX file of images; what a model reads of the first pixel of item 1: in colour, and in gray
COLOURS = {
    (2, 4, 5, 3): ([60, 61, 62], 61),
    (2, 3, 4, 5): ([60, 80, 100], 76),
    (2, 4, 5, 1): ([20, 20, 20], 20),
    (2, 1, 4, 5): ([20, 20, 20], 20),
    (2, 4, 5): ([20, 20, 20], 20),
}


@pytest.mark.parametrize("shape", COLOURS, ids=str)
def test_colour_images_are_read_where_their_dimensions_are_certain(tmp_path: Path, shape: tuple[int, ...]) -> None:
    put_idx(tmp_path, "train-images-idx4-ubyte", "train-labels-idx1-ubyte", [0, 1])
    pixels = bytes(number % 256 for number in range(int(np.prod(shape))))
    (tmp_path / "train-images-idx4-ubyte").write_bytes(idx(8, shape, pixels))
    colour, gray = COLOURS[shape]

    def read(*shape: int) -> list[int]:
        means = (0.0,) * shape[0]
        images = open_images(tmp_path, ModelSpec("m", ("a", "b"), shape, means, (1.0,) * shape[0]))
        batch = images.read(np.array([1]))
        assert batch.shape == (1, *shape)
        return list(map(int, batch[0, :, 0, 0]))

    assert read(3, 4, 5) == colour
    assert read(1, 4, 5) == [gray]
    assert len(read(3, 2, 2)) == 3


# the header and the data of an IDX file, and what is said of it
UNREADABLE = [
    (idx(8, (2, 3, 4, 3), bytes(72)), r"of shape \(3, 4, 3\), .* both 3 and 3 may be the number of colours"),
    (idx(8, (2, 4, 4, 4), bytes(128)), r"of shape \(4, 4, 4\), which cannot be read as images: images are of shape"),
    (idx(8, (2, 16), bytes(32)), r"of shape \(16,\), which cannot be read as images: images are of shape"),
    (idx(13, (2, 4, 4), bytes(128)), "holds 32-bit floats, and items are unsigned bytes, 0 to 255; write it again"),
    (idx(12, (2, 4, 4), bytes(128)), "holds 32-bit integers, and items are unsigned bytes"),
    (b"PK\x03\x04", "is damaged or of another kind: it begins with 50 4b 03 04"),
]


@pytest.mark.parametrize(("content", "said"), UNREADABLE)
def test_what_is_no_idx_file_of_images_is_named_with_the_reason(tmp_path: Path, content: bytes, said: str) -> None:
    put_idx(tmp_path, *LAYOUTS["torchvision"], [0, 1])
    (tmp_path / LAYOUTS["torchvision"][0]).write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        open_images(tmp_path, ModelSpec("m", ("a", "b"), (1, 4, 4), (0.0,), (1.0,)))
    assert "train-images-idx3-ubyte" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_of_two_dimensions_are_told(tmp_path: Path) -> None:
    put_idx(tmp_path, *LAYOUTS["torchvision"], [0, 1])
    (tmp_path / LAYOUTS["torchvision"][1]).write_bytes(idx(8, (2, 2), bytes(4)))
    with pytest.raises(DataError, match="has 2 dimensions, and 1 are expected: one number for each image"):
        scan(tmp_path, ("a", "b"))


def test_unpacked_files_beside_their_archives_are_one_set(tmp_path: Path) -> None:
    for end in ("", ".gz"):
        put_idx(tmp_path / "MNIST/raw", f"train-images-idx3-ubyte{end}", f"train-labels-idx1-ubyte{end}", [0])
    pair = find_idx(tmp_path, "train")
    assert pair is not None
    assert (pair.images.name, pair.labels.name) == ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")


# two sets of which nobody can say which is meant
AMBIGUOUS = [
    ("emnist-letters-train", "emnist-digits-train"),
    ("train", "fashion/train"),
    ("mnist/train", "fashion/train"),
]


@pytest.mark.parametrize(("one", "other"), AMBIGUOUS)
def test_two_sets_are_refused_by_name(tmp_path: Path, one: str, other: str) -> None:
    for name in (one, other):
        put_idx(tmp_path, f"{name}-images-idx3-ubyte", f"{name}-labels-idx1-ubyte", [0])
    with pytest.raises(DataError, match=r"holds 2 data sets for train: .*move all but one away") as caught:
        scan(tmp_path, None)
    assert one in str(caught.value)
    assert other in str(caught.value)


# the set of one split, of the other, and whether they may belong together
HALVES = [
    ("train", "emnist-test", False),
    ("emnist-letters-train", "emnist-digits-test", False),
    ("mnist/train", "fashion/t10k", False),
    ("train", "t10k", True),
    ("mnist_train/train", "mnist_test/t10k", True),
    ("emnist-letters-train", "emnist-letters-test", True),
]


@pytest.mark.parametrize(("one", "other", "together"), HALVES)
def test_splits_of_two_sets_are_refused_by_name(tmp_path: Path, one: str, other: str, together: bool) -> None:
    for name in (one, other):
        put_idx(tmp_path, f"{name}-images-idx3-ubyte", f"{name}-labels-idx1-ubyte", [0])
    for split in ("train", "test"):
        if together:
            assert find_idx(tmp_path, split) is not None
            continue
        with pytest.raises(DataError, match=f"holds parts of different data sets: for {split} .*; move what") as caught:
            find_idx(tmp_path, split)
        assert f"{one}-images" in str(caught.value)
        assert f"{other}-images" in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "picture", "split"),
    [
        ("old/MNIST/", "cat/1.png", "train"),
        ("MNIST/raw/", "train/cat/2026/1.png", "train"),
        ("MNIST/", "test/cat/1.png", "test"),
    ],
)
def test_an_idx_set_further_down_does_not_hide_class_folders(
    tmp_path: Path, folder: str, picture: str, split: str
) -> None:
    put_idx(tmp_path, f"{folder}{split}-images-idx3-ubyte", f"{folder}{split}-labels-idx1-ubyte", [0])
    assert find_idx(tmp_path, split) is not None
    (tmp_path / picture).parent.mkdir(parents=True)
    (tmp_path / picture).write_bytes(b"x")
    said = f"holds class folders with images, such as {picture}, and an IDX data set in .*; name that folder"
    with pytest.raises(DataError, match=said):
        find_idx(tmp_path, split)
    assert find_idx(tmp_path / folder, split) is not None


def test_images_beside_an_idx_set_in_the_same_folder_are_said_to_be_left(tmp_path: Path) -> None:
    put_idx(tmp_path, *LAYOUTS["with dots"], [0])
    put_images(tmp_path, "cat")
    (_, note) = scan(tmp_path, None).notes
    assert note == "images in folders beside these files, such as cat/1.png, are not read"


LETTERS = tuple("abc")


def test_labels_that_start_at_1_are_told_as_that(tmp_path: Path) -> None:
    put_idx(tmp_path, *LAYOUTS["EMNIST"], [1, 3, 2])
    said = (
        r"has labels 3; the job has the 3 classes 'a', 'b', 'c', that is labels 0 to 2; the labels here start at 1: if "
        r"1 stands for 'a', set \[model\] first_label = 1 in the job file"
    )
    with pytest.raises(DataError, match=said):
        scan(tmp_path, LETTERS)


def test_labels_that_start_at_1_are_read_as_the_job_says(tmp_path: Path) -> None:
    put_idx(tmp_path, *LAYOUTS["EMNIST"], [1, 3, 3])
    assert scan(tmp_path, LETTERS, first_label=1).class_counts == (1, 0, 2)
    assert scan(tmp_path, None).class_counts == (0, 1, 0, 2)  # an agent that knows no job counts by label
    spec = ModelSpec("m", LETTERS, (1, 2, 2), (0.0,), (1.0,), first_label=1)
    assert open_images(tmp_path, spec).labels.tolist() == [0, 2, 2]
    put_idx(tmp_path, *LAYOUTS["EMNIST"], [0, 1])
    with pytest.raises(DataError, match=r"has labels 0; .* that is labels 1 to 3"):
        scan(tmp_path, LETTERS, first_label=1)


@pytest.mark.parametrize("kind", [8, 9, 11, 12])
def test_labels_may_be_integers_of_any_width(tmp_path: Path, kind: int) -> None:
    put_idx(tmp_path, *LAYOUTS["gzipped"], [2, 0, 100], kind)
    classes = tuple(map(str, range(101)))
    summary = scan(tmp_path, classes)
    assert [place for place, count in enumerate(summary.class_counts) if count] == [0, 2, 100]
    assert open_images(tmp_path, ModelSpec("m", classes, (1, 2, 2), (0.0,), (1.0,))).labels.tolist() == [2, 0, 100]


@pytest.mark.parametrize("labels", [[-1, 0], [0, 1 << 30]])
def test_labels_that_cannot_count_classes_are_refused(tmp_path: Path, labels: list[int]) -> None:
    put_idx(tmp_path, *LAYOUTS["with dots"], labels, 12)
    with pytest.raises(DataError, match=f"has labels from {labels[0]} to {labels[1]}; labels count classes"):
        scan(tmp_path, None)
