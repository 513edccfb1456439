"""What a scan finds in a data directory, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedepth.data.idx import write_idx
from fedepth.data.scan import DataSummary, scan
from fedepth.errors import DataError


def put_idx(
    directory: Path, labels: list[int], images: int | None = None, prefix: str = "train", end: str = ""
) -> None:
    count = len(labels) if images is None else images
    write_idx(directory / f"{prefix}-images-idx3-ubyte{end}", np.zeros((count, 2, 2), np.uint8))
    write_idx(directory / f"{prefix}-labels-idx1-ubyte{end}", np.array(labels, np.uint8))


def put_folders(directory: Path, **counts: int) -> None:
    """Files that are named like images: a scan does not decode them."""
    for name, count in counts.items():
        (directory / name).mkdir(parents=True)
        for number in range(count):
            (directory / name / f"{number}.png").write_bytes(b"x")


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_labels_are_counted_by_class(tmp_path: Path, end: str) -> None:
    put_idx(tmp_path, [2, 0, 2, 2], end=end)
    assert scan(tmp_path, ("a", "b", "c")) == DataSummary(4, (1, 0, 3), "idx", ("a", "b", "c"))


def test_without_classes_idx_labels_name_themselves(tmp_path: Path) -> None:
    put_idx(tmp_path, [2, 0])
    assert scan(tmp_path, None) == DataSummary(2, (1, 0, 1), "idx", ("0", "1", "2"))


@pytest.mark.parametrize("prefix", ["t10k", "test"])
def test_the_test_split_of_idx_has_two_names(tmp_path: Path, prefix: str) -> None:
    put_idx(tmp_path, [0])
    put_idx(tmp_path, [1, 1], prefix=prefix)
    assert scan(tmp_path, ("a", "b"), "test").class_counts == (0, 2)
    assert scan(tmp_path, ("a", "b")).class_counts == (1, 0)


def test_class_folders_are_counted_in_the_order_of_the_job(tmp_path: Path) -> None:
    put_folders(tmp_path, ant=3, bee=2)
    assert scan(tmp_path, ("bee", "cat", "ant")) == DataSummary(5, (2, 0, 3), "folders", ("bee", "cat", "ant"))
    assert scan(tmp_path, None) == DataSummary(5, (3, 2), "folders", ("ant", "bee"))


@pytest.mark.parametrize("test", ["test", "val"])
def test_splits_may_lie_in_folders(tmp_path: Path, test: str) -> None:
    put_folders(tmp_path / "train", ant=3)
    put_folders(tmp_path / test, ant=1)
    assert scan(tmp_path, ("ant",)).sample_count == 3
    assert scan(tmp_path, ("ant",), "test").sample_count == 1


def test_a_test_folder_beside_class_folders_is_no_class(tmp_path: Path) -> None:
    put_folders(tmp_path, ant=2)
    put_folders(tmp_path / "test", ant=1)
    (tmp_path / "test" / "stray.png").write_bytes(b"")
    assert scan(tmp_path, None).classes == ("ant",)


def test_classes_may_be_called_train_and_test(tmp_path: Path) -> None:
    put_folders(tmp_path, train=2, test=1)
    assert scan(tmp_path, ("test", "train")).class_counts == (1, 2)


def test_only_image_files_are_counted(tmp_path: Path) -> None:
    put_folders(tmp_path, ant=0)
    for name in ("a.JPG", "b.jpeg", "c.bmp", "d.webp", "notes.txt", ".hidden.png"):
        (tmp_path / "ant" / name).write_bytes(b"x")
    (tmp_path / "ant" / "folder.png").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.png").write_bytes(b"")
    assert scan(tmp_path, ("ant",)).sample_count == 4


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent does not exist"):
        scan(tmp_path / "absent", None)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="file is not a directory"):
        scan(tmp_path / "file", None)


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        scan(tmp_path, ("ant",))
    put_folders(tmp_path, ant=0)
    with pytest.raises(DataError, match="holds no images"):
        scan(tmp_path, ("ant",))


def test_an_idx_file_without_images_is_refused(tmp_path: Path) -> None:
    put_idx(tmp_path, [])
    with pytest.raises(DataError, match="holds no images"):
        scan(tmp_path, ("a",))


def test_a_missing_test_split_is_told(tmp_path: Path) -> None:
    put_folders(tmp_path, ant=1)
    with pytest.raises(DataError, match="no test split"):
        scan(tmp_path, ("ant",), "test")
    with pytest.raises(DataError, match="no split 'dev'"):
        scan(tmp_path, ("ant",), "dev")


def test_folders_outside_the_classes_are_named_with_the_classes(tmp_path: Path) -> None:
    put_folders(tmp_path, ant=1, wasp=1, bee=1)
    with pytest.raises(
        DataError, match=r"2 folders that are not classes of the job \('ant', 'cat'\): folder 'bee'; folder 'wasp'"
    ):
        scan(tmp_path, ("ant", "cat"))


def test_labels_outside_the_classes_are_named_with_the_classes(tmp_path: Path) -> None:
    put_idx(tmp_path, [0, 9, 1, 2])
    with pytest.raises(DataError, match=r"has labels 2, 9; the job has the 2 classes 'a', 'b', that is labels 0 to 1"):
        scan(tmp_path, ("a", "b"))


def test_a_long_list_of_names_is_cut(tmp_path: Path) -> None:
    put_idx(tmp_path, list(range(30)))
    with pytest.raises(DataError, match=r"labels 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 19 more;"):
        scan(tmp_path, ("a",))


def test_counts_that_differ_are_told(tmp_path: Path) -> None:
    put_idx(tmp_path, [0, 1], images=3)
    with pytest.raises(DataError, match=r"3 images, .* 2 labels"):
        scan(tmp_path, ("a", "b"))


@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
def test_half_an_idx_pair_is_told(tmp_path: Path, kind: str) -> None:
    put_idx(tmp_path, [0])
    (tmp_path / f"train-{kind}-ubyte").unlink()
    with pytest.raises(DataError, match=f"no train-{kind}-ubyte"):
        scan(tmp_path, ("a",))


def test_a_damaged_idx_header_is_a_data_error(tmp_path: Path) -> None:
    put_idx(tmp_path, [0])
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"damaged header")
    with pytest.raises(DataError, match="damaged"):
        scan(tmp_path, ("a",))


def test_a_scan_loads_neither_numpy_nor_pillow(tmp_path: Path) -> None:
    put_idx(tmp_path, [0], end=".gz")
    code = (
        "import sys; from pathlib import Path; from fedepth.data.scan import scan; "
        "scan(Path(sys.argv[1]), None); "
        "sys.exit(' '.join({'numpy', 'PIL', 'torch', 'sklearn', 'safetensors'} & set(sys.modules)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
