"""Folders of images as people have them: what is taken, and what is left out by folder and reason.

A further case of `TREES` is a row: what lies in the folder, how many images of each class are taken, and what is said
of the rest. A path that ends with "/" is a folder; the content `IMAGE` is a small image in the format of its name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.config import load
from fedepth.data.damage import load_damage
from fedepth.data.read import open_images, read_sound
from fedepth.data.scan import scan
from fedepth.errors import ConfigError, DataError
from fedepth.task import ModelSpec
from tests.field.pictures import png_header
from tests.field.trees import IMAGE, Content, bind, cut, link, look, put, rotten

# what it is: what lies there, images by class, {(folder, reason): (how many, such as)}
TREES: dict[str, tuple[dict[str, Content], dict[str, int], dict[tuple[str, str], tuple[int, str]]]] = {
    "nested by day": (
        {"up/2026-06-01/1.png": IMAGE, "up/2026-06-02/am/1.png": IMAGE, "down/1.png": IMAGE},
        {"down": 1, "up": 2},
        {},
    ),
    "every suffix in any case": (
        {f"a/{n}{suffix}": IMAGE for n, suffix in enumerate((".JPG", ".jpeg", ".Jfif", ".jpe", ".PNG", ".gif", ".Tif"))}
        | {f"b/{n}{suffix}": IMAGE for n, suffix in enumerate((".TIFF", ".webp", ".BMP", ".ppm", ".tga"))},
        {"a": 7, "b": 5},
        {},
    ),
    "what operating systems leave": (
        {
            "a/1.png": IMAGE,
            "a/._1.png": b"\0\5\x16\7",
            "a/.DS_Store": b"x",
            "a/Thumbs.db": b"x",
            "a/desktop.ini": b"x",
            "a/.hidden.png": IMAGE,
            ".cache/a/1.png": IMAGE,
            "__MACOSX/a/1.png": IMAGE,
            "a/@eaDir/1.png": IMAGE,
        },
        {"a": 1},
        {
            ("", "hidden"): (1, ".cache"),
            ("", "folder of an operating system"): (1, "__MACOSX"),
            ("a", "AppleDouble file of macOS"): (1, "a/._1.png"),
            ("a", "file of an operating system"): (3, "a/.DS_Store"),
            ("a", "folder of an operating system"): (1, "a/@eaDir"),
            ("a", "hidden"): (1, "a/.hidden.png"),
        },
    ),
    "what Windows leaves": (
        {
            "a/1.png": IMAGE,
            "a/1 - Copy.png": IMAGE,
            "a/~$report.docx": b"x",
            "a/1.png:Zone.Identifier": b"x",
            "a/photo.jpg.tmp": b"x",
            "a/1.png - Shortcut.lnk": b"x",
            "$RECYCLE.BIN/x/1.png": IMAGE,
        },
        {"a": 2},
        {
            ("", "folder of an operating system"): (1, "$RECYCLE.BIN"),
            ("a", "not an image (.docx)"): (1, "a/~$report.docx"),
            ("a", "not an image (.identifier)"): (1, "a/1.png:Zone.Identifier"),
            ("a", "not an image (.tmp)"): (1, "a/photo.jpg.tmp"),
            ("a", "not an image (.lnk)"): (1, "a/1.png - Shortcut.lnk"),
        },
    ),
    "photos that are still in iCloud": (
        {"a/1.png": IMAGE, "a/.IMG_1.jpg.icloud": b"bplist00"},
        {"a": 1},
        {("a", "file that is still in iCloud: download it"): (1, "a/.IMG_1.jpg.icloud")},
    ),
    "videos and documents among photos": (
        {
            "a/1.png": IMAGE,
            "a/IMG_1.MOV": b"x",
            "a/IMG_2.mp4": b"x",
            "a/scan.pdf": b"x",
            "a/x-ray.dcm": b"x",
            "a/1.X3F": b"x",
        },
        {"a": 1},
        {
            ("a", "a video: only images are read"): (2, "a/IMG_1.MOV"),
            ("a", "not read: convert it to JPEG or PNG"): (2, "a/scan.pdf"),
            ("a", "a camera's raw file, which is not read: convert it to JPEG or PNG"): (1, "a/1.X3F"),
        },
    ),
    "odd names": (
        dict.fromkeys(
            (
                "a/new\nline.png",
                "a/😀.png",
                "a/\u202egnp.x.png",
                "a/cafe\u0301.png",
                "a/caf\u00e9.png",
                "a/-rf.png",
                "a/x.png.png",
            ),
            IMAGE,
        ),
        {"a": 7},
        {},
    ),
    "links to folders above": (
        {"a/1.png": IMAGE, "a/up": link("../.."), "all": link("/"), "../other.png": IMAGE},
        {"a": 1},
        {
            ("a", "link to a folder that the data lie in"): (1, "a/up/"),
            ("all", "link to a folder that the data lie in"): (1, "all/"),
            ("all", "class folder without images"): (1, "all"),
        },
    ),
    "other files": (
        {
            "a/1.png": IMAGE,
            "a/notes.txt": b"x",
            "a/more.txt": b"x",
            "a/Makefile": b"x",
            "a/live.heic": b"x",
            "a/new.AVIF": b"x",
            "a/logo.svg": b"x",
            "a/sub/camera.NEF": b"x",
            "a/photos.zip": b"x",
        },
        {"a": 1},
        {
            ("a", "not an image (.txt)"): (2, "a/more.txt"),
            ("a", "file without a suffix: an image needs one, such as .jpg"): (1, "a/Makefile"),
            ("a", "HEIC, which is not read: convert it to JPEG or PNG"): (1, "a/live.heic"),
            ("a", "AVIF, which is not read: convert it to JPEG or PNG"): (1, "a/new.AVIF"),
            ("a", "SVG, which is not read: convert it to JPEG or PNG"): (1, "a/logo.svg"),
            ("a", "a camera's raw file, which is not read: convert it to JPEG or PNG"): (1, "a/sub/camera.NEF"),
            ("a", "an archive: unpack it"): (1, "a/photos.zip"),
        },
    ),
    "in no class": (
        {"a/1.png": IMAGE, "stray.jpg": IMAGE, "read.me": b"x"},
        {"a": 1},
        {
            ("", "image in no class folder: move it into one"): (1, "stray.jpg"),
            ("", "not an image (.me)"): (1, "read.me"),
        },
    ),
    "classes without images": (
        {"a/1.png": IMAGE, "b/": None, "c/notes.txt": b"x"},
        {"a": 1},
        {
            ("b", "class folder without images"): (1, "b"),
            ("c", "class folder without images"): (1, "c"),
            ("c", "not an image (.txt)"): (1, "c/notes.txt"),
        },
    ),
    "empty files": (
        {"a/1.png": IMAGE, "a/2.png": b"", "a/3.jpg": b""},
        {"a": 1},
        {("a", "empty file"): (2, "a/2.png")},
    ),
    "no files at all": (
        {"a/1.png": IMAGE, "a/pipe.png": os.mkfifo, "a/socket.jpg": bind, "a/folder.png/2.png": IMAGE},
        {"a": 2},
        {("a", "a pipe"): (1, "a/pipe.png"), ("a", "a socket"): (1, "a/socket.jpg")},
    ),
    "links": (
        {
            "a/1.png": IMAGE,
            "a/again.png": link("1.png"),
            "a/gone.png": link("nowhere"),
            "a/self.png": link("self.png"),
            "a/up": link(".."),
            "b": link("../elsewhere"),
            "../elsewhere/x/2.png": IMAGE,
            "aa-first": link("a"),
            "null.png": link("/dev/null"),
        },
        {"a": 2, "b": 1},
        {
            ("a", "link to itself"): (1, "a/self.png"),
            ("a", "link to nothing"): (1, "a/gone.png"),
            ("a", "link to a folder that is read already"): (1, "a/up/"),
            ("aa-first", "link to a folder that is read already"): (1, "aa-first/"),
            ("aa-first", "class folder without images"): (1, "aa-first"),
            ("", "a device"): (1, "null.png"),
        },
    ),
    "beside the split": (
        {"train/a/1.png": IMAGE, "test/a/2.png": IMAGE, "b/3.png": IMAGE},
        {"a": 1},
        {("", "beside the folder 'train', which is read"): (1, "b/")},
    ),
    "names that are no text": (
        {os.fsdecode(b"caf\xe9/\xff.png"): IMAGE, os.fsdecode(b"caf\xe9/\xff.txt"): b"x"},
        {os.fsdecode(b"caf\xe9"): 1},
        {(os.fsdecode(b"caf\xe9"), "not an image (.txt)"): (1, os.fsdecode(b"caf\xe9/\xff.txt"))},
    ),
    "splits with a capital": ({"Train/a/1.png": IMAGE, "Validation/a/2.png": IMAGE}, {"a": 1}, {}),
}


@pytest.mark.parametrize("case", TREES)
def test_what_is_taken_and_what_is_left_out(tmp_path: Path, case: str) -> None:
    tree, classes, left_out = TREES[case]
    summary = scan(put(tmp_path / "data", tree), None)
    assert dict(zip(summary.classes, summary.class_counts, strict=True)) == classes
    assert {(row.folder, row.reason): (row.count, row.example) for row in summary.left_out} == left_out
    shape = ModelSpec("m", tuple(classes), (3, 4, 4), (0.0,) * 3, (1.0,) * 3)
    images = open_images(tmp_path / "data", shape)
    assert np.bincount(images.labels).tolist() == list(classes.values())
    assert images.read(np.arange(len(images))).shape == (sum(classes.values()), 3, 4, 4)


def test_a_folder_that_cannot_be_entered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {"a/1.png": IMAGE, "b/locked/2.png": IMAGE})
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    summary = scan(tmp_path, None)
    assert summary.class_counts == (1,)
    (locked, _) = summary.left_out
    assert (locked.reason, locked.example) == ("folder that cannot be read: Permission denied", "b/locked/")


# So many classes and bytes of their names as a job may have, and what is there: within these or not.
MANY: list[tuple[int, int, list[str], bool]] = [
    (3, 100, ["a/1.png", "b/1.png", "c/1.png"], True),
    (2, 100, ["a/1.png", "b/1.png", "c/1.png"], False),
    (2, 100, ["a/1.png", "b/1.png", "c/notes.txt"], True),
    (3, 100, ["a" * 50 + "/1.png", "b" * 50 + "/1.png"], False),
    (3, 100, ["a" * 42 + "/1.png", "b" * 42 + "/1.png"], True),
    (2, 100, ["train/a/1.png", "train/b/1.png", "test/c/1.png"], False),  # a job may have a class called test
]


@pytest.mark.parametrize(("classes", "size", "files", "fits"), MANY)
def test_more_folders_than_a_job_has_classes_are_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int, size: int, files: list[str], fits: bool
) -> None:
    monkeypatch.setattr("fedepth.data.scan.MOST_CLASSES", classes)
    monkeypatch.setattr("fedepth.data.scan.MOST_NAMES_BYTES", size)
    put(tmp_path, dict.fromkeys(files, b"x"))
    if fits:
        assert scan(tmp_path, None).sample_count == sum(name.endswith("png") for name in files)
    else:
        with pytest.raises(DataError, match=r"folders with images, such as '.*', and each would be a class; a job has"):
            scan(tmp_path, None)


def test_where_nothing_is_taken_the_refusal_says_what_there_is(tmp_path: Path) -> None:
    put(tmp_path, {"a/1.heic": b"x", "2.png": IMAGE})
    said = r"holds no images: .* it does hold 1 × image in no class folder.*such as 2\.png; 1 × HEIC.*such as a/1\.heic"
    with pytest.raises(DataError, match=said):
        scan(tmp_path, None)


# what lies in a folder of which nothing is taken, or another class, and what is said of it
EXPECTED: dict[str, tuple[dict[str, Content], str]] = {
    "a list of labels": (
        {"1.png": IMAGE, "2.png": IMAGE, "labels.csv": b"1.png,cat"},
        r"expected are folders, one for each class, .*; labels are read from the names of folders, not from a file or",
    ),
    "classes in names of files": (
        {"cat.1.png": IMAGE, "dog.1.png": IMAGE},
        "labels are read from the names of folders",
    ),
    "no suffixes": ({"cat/1": b"x"}, r"1 × file without a suffix: an image needs one, such as \.jpg, such as cat/1"),
    "an archive": ({"train.zip": b"PK\3\4"}, r"it does hold 1 × an archive: unpack it, such as train\.zip"),
    "a folder too high": (
        {"photos/cat/1.png": IMAGE, "photos/dog/1.png": IMAGE},
        r"folder 'photos'; rename .*, or name .*/photos, in which folders of classes lie",
    ),
    "a folder above the splits": ({"set/train/cat/1.png": IMAGE}, "or name .*/set, in which folders of classes lie"),
    "another case": ({"Cat/1.png": IMAGE, "cat/1.png": IMAGE}, "folder 'Cat' - did you mean class 'cat'"),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_what_is_expected_is_said(tmp_path: Path, case: str) -> None:
    tree, said = EXPECTED[case]
    with pytest.raises(DataError, match=said):
        scan(put(tmp_path / "data", tree), ("cat", "dog"))


def test_an_archive_in_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes(b"PK\3\4")
    with pytest.raises(
        DataError, match=r"photos\.zip is an archive; unpack it, and name the folder with the setting `data`"
    ):
        scan(tmp_path / "photos.zip", None)


def test_a_folder_that_may_lie_too_high_is_noted_before_the_job_is_known(tmp_path: Path) -> None:
    put(tmp_path, {"photos/cat/1.png": IMAGE, "photos/dog/1.png": IMAGE})
    (note,) = scan(tmp_path, None).notes
    assert note == (
        f"folder 'photos' counts as one class; if the folders in it are classes, such as 'cat', name {tmp_path}/photos "
        "with the setting `data`"
    )


def test_reasons_are_bounded_in_number(tmp_path: Path) -> None:
    put(tmp_path, {"a/1.png": IMAGE} | {f"a/{n}.x{n}": b"x" for n in range(300)})
    rows = scan(tmp_path, None).left_out
    assert len(rows) == 201
    assert sum(row.count for row in rows) == 300


# --- damaged files


def many(count: int) -> dict[str, Content]:
    return {f"data/a/{number:02}.png": IMAGE for number in range(count)}


# what is damaged, and what is said of it
DAMAGE: dict[str, tuple[str, Content, str]] = {
    "empty": ("x.jpg", b"", ""),
    "cut JPEG": ("x.jpg", cut, "x.jpg cannot be read as an image: image file is truncated"),
    "cut PNG": ("x.png", cut, "x.png cannot be read as an image"),
    "cut GIF": ("x.gif", cut, "x.gif cannot be read as an image"),
    "cut TIFF": ("x.tif", cut, "x.tif cannot be read as an image"),
    "cut BMP": ("x.bmp", cut, "x.bmp cannot be read as an image"),
    "cut WebP": ("x.webp", cut, "x.webp cannot be read as an image"),
    "text": ("x.png", b"hello", "x.png cannot be read as an image: no format that is read begins with 68 65"),
    "too many pixels": ("x.png", lambda path: png_header(path, 60_000, 60_000), "x.png has 60000×60000 pixels, and at"),
    "HEIC by another name": ("x.jpg", b"\0\0\0\x18ftypheic", "x.jpg is an HEIC image"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_one_damaged_file_of_48_is_named_and_bars_nothing(tmp_path: Path, case: str) -> None:
    name, content, said = DAMAGE[case]
    put(tmp_path, many(47) | {f"data/b/{name}": content, "data/b/1.png": IMAGE})
    samples, logs = look(tmp_path)
    assert (samples.count, samples.summary.class_counts, samples.summary.damaged) == (48, (47, 1), 1)
    (row,) = [line for line in logs if line["event"] == "left out of the training data"]
    assert (row["folder"], row["number"], row["such_as"]) == ("b", 1, f"b/{name}")
    assert [said in line["file"] for line in logs if line["event"] == "damaged"] == [True] * bool(said)
    images = open_images(
        tmp_path / "data", ModelSpec("m", ("a", "b"), (1, 4, 4), (0.0,), (1.0,)), damage=samples.damage.keys
    )
    assert len(images) == 48
    images.read(np.arange(48))
    assert look(tmp_path, samples)[1] == []  # it is said once


@pytest.mark.parametrize(
    ("damaged", "most", "bars"), [(1, 0.05, False), (2, 0.05, True), (2, 0.1, False), (1, 0, True)]
)
def test_a_share_of_damaged_files_bars_the_device(tmp_path: Path, damaged: int, most: float, bars: bool) -> None:
    put(tmp_path, many(20 - damaged) | {f"data/a/x{number}.png": cut for number in range(damaged)})
    if not bars:
        assert look(tmp_path, most_damaged=most)[0].count == 20 - damaged
        return
    said = (
        rf"{damaged} of 20 image files are damaged \({damaged * 5}%\), and most_damaged allows .*x0\.png cannot be read"
    )
    with pytest.raises(DataError, match=said):
        look(tmp_path, most_damaged=most)


def test_where_all_are_damaged_that_is_what_is_said(tmp_path: Path) -> None:
    put(tmp_path, {f"data/a/{number}.png": cut for number in range(3)})
    with pytest.raises(DataError, match=r"3 of 3 image files are damaged \(100%\)"):
        look(tmp_path)


def test_only_new_and_changed_files_are_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, many(30) | {"data/a/x.png": cut})
    opened: list[str] = []

    def check_image(path: Path) -> None:
        opened.append(path.name)

    samples, _ = look(tmp_path)
    monkeypatch.setattr("fedepth.data.check.check_image", check_image)
    look(tmp_path, samples)
    assert opened == []
    look(tmp_path)  # a new start tries what was damaged once more
    assert opened == ["x.png"]
    put(tmp_path, {"data/a/new.png": IMAGE, "data/a/x.png": IMAGE})
    look(tmp_path, samples)
    assert opened == ["x.png", "new.png", "x.png"]
    assert samples.count == 32


def test_what_only_decoding_finds_is_found_by_decoding_all(tmp_path: Path) -> None:
    put(tmp_path, many(40) | {"data/a/x.png": rotten})
    samples, _ = look(tmp_path)
    assert samples.count == 41
    look(tmp_path, samples, decode=True)
    assert samples.count == 40
    put(tmp_path, {"data/a/y.png": rotten})
    look(tmp_path, samples)  # from now on new files are decoded at once
    assert samples.count == 40
    assert len(samples.damage.damaged) == 2


def test_damaged_test_images_are_found_as_they_are_read(tmp_path: Path) -> None:
    put(tmp_path, {"test/a/1.png": IMAGE, "test/a/2.png": rotten, "test/a/3.png": IMAGE})
    images = open_images(tmp_path, ModelSpec("m", ("a",), (3, 4, 4), (0.0,) * 3, (1.0,) * 3), "test")
    pixels, kept, errors = read_sound(images, np.arange(3))
    assert (pixels.shape, kept.tolist(), len(errors)) == ((2, 3, 4, 4), [0, 2], 1)
    assert "2.png cannot be read" in str(errors[0])


def test_a_record_that_cannot_be_read_is_made_again(tmp_path: Path) -> None:
    put(tmp_path, many(3))
    look(tmp_path)
    for name in ("data-check", "data-check.sound"):
        (tmp_path / "state" / name).write_bytes(b"damaged")
    assert load_damage(tmp_path / "state/data-check").fingerprint is None
    assert look(tmp_path)[0].count == 3


def test_names_that_are_no_text_are_logged_and_reported_as_text(tmp_path: Path) -> None:
    put(tmp_path / "data", {os.fsdecode(b"caf\xe9/\xff.png"): cut, os.fsdecode(b"caf\xe9/a.png"): IMAGE})
    samples, logs = look(tmp_path, most_damaged=1)
    assert samples.class_names == ("caf\\udce9",)
    assert all(str(value).isprintable() for line in logs for value in line.values())
    assert "caf\\udce9/\\udcff.png cannot be read" in logs[-1]["file"]


def test_what_cannot_be_recorded_counts_all_the_same(tmp_path: Path) -> None:
    put(tmp_path, many(30) | {"data/a/x.png": cut, "state": b"not a folder"})
    samples, logs = look(tmp_path)
    assert samples.count == 30
    (line,) = [line for line in logs if "recorded" in line["event"]]
    assert "File exists" in line["error"] or "Not a directory" in line["error"]
    assert look(tmp_path, samples)[0].count == 30


def test_the_share_is_checked_where_it_is_set() -> None:
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"most_damaged is .* but must be between 0 and 1"):
            load(None, {"most_damaged": share})
