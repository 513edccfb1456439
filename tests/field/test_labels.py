"""What people call their classes, and how they lay out IDX files.

A further case is a row of one of the tables.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedepth.data.labels import by_class, lacking, unknown_names
from fedepth.data.read import open_images
from fedepth.data.scan import find_idx, scan
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
        path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
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
    "a folder": ("fashion/train-images-idx3-ubyte", "fashion/train-labels-idx1-ubyte"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_idx_files_are_found_under_the_names_that_people_have(tmp_path: Path, case: str) -> None:
    put_idx(tmp_path, *LAYOUTS[case], [1, 0, 1])
    summary = scan(tmp_path, ("a", "b"))
    assert (summary.layout, summary.class_counts) == ("idx", (1, 2))
    images = open_images(tmp_path, ModelSpec("m", ("a", "b"), (1, 2, 2), (0.0,), (1.0,)))
    assert images.read(np.array([0, 1]))[:, 0, 0, 0].tolist() == [1, 0]


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
