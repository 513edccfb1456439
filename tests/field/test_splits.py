"""Folders that are called as a split and may be a class: what a device counts before it knows the job, and after.

A further case is a row of `SPLITS`, or a tree or a job of `TREES` and `JOBS`, each of which meets each.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.admission import check_report, counted_for, lacking_classes
from fedepth.data.scan import scan
from fedepth.errors import DataError
from fedepth.job_sections import LimitsSection
from fedepth.task import DeviceReport, ModelSpec
from tests.coordinator.conftest import report_of
from tests.field.trees import IMAGE, cut, look, put

# what lies there, classes of the job (None: not known yet), split, images by class
SPLITS: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None, str, tuple[int, ...]]] = {
    "a class called as the split that it lies in": (
        ("train/bus/1.png", "train/bus/2.png", "train/train/3.png"),
        ("bus", "train"),
        "train",
        (2, 1),
    ),
    "the same before the job is known": (("train/bus/1.png", "train/train/3.png"), None, "train", (1, 1)),
    "a class called test in the test split": (
        ("train/ok/1.png", "test/ok/1.png", "test/test/2.png"),
        ("ok", "test"),
        "test",
        (1, 1),
    ),
    "classes without splits, one called train": (("train/1.png", "bus/1.png"), ("train", "bus"), "train", (1, 1)),
    "its images lie deeper": (("train/2026/1.png", "bus/1.png"), ("train", "bus"), "train", (1, 1)),
    "classes called as all splits": (
        ("ok/1.png", "test/2.png", "val/1.png"),
        ("ok", "test", "val"),
        "train",
        (1, 1, 1),
    ),
    "the others before the job is known": (("train/1.png", "bus/1.png", "car/1.png"), None, "train", (1, 1)),
}


@pytest.mark.parametrize("case", SPLITS)
def test_a_split_is_told_from_a_class_of_its_name(tmp_path: Path, case: str) -> None:
    names, classes, split, counts = SPLITS[case]
    put(tmp_path, dict.fromkeys(names, IMAGE))
    assert scan(tmp_path, classes, split).class_counts == counts


def test_what_lies_beside_the_split_is_said(tmp_path: Path) -> None:
    put(tmp_path, dict.fromkeys(("train/a/1.png", "Train/a/2.png", "training/a/3.png"), IMAGE))
    (row,) = scan(tmp_path, None).left_out
    assert (row.count, row.example, row.reason) == (2, "Train/", "beside the folder 'train', which is read")


# Trees that may be read in several ways, and classes of jobs; image files are named by a path.
TREES = {
    "flat": ("cat/1", "cat/2", "dog/1", "test/1", "test/2", "test/3"),
    "flat, with all names": ("cat/1", "train/1", "val/1", "test/1", "validation/1"),
    "flat, nothing but one of them": ("train/1", "train/2"),
    "flat, nothing but them": ("train/1", "test/1"),
    "deeper": ("train/2026/1", "train/2026/2", "train/2", "cat/1", "test/2026/1"),
    "deeper, nothing but one of them": ("train/2026/1", "train/2027/1"),
    "splits": ("train/cat/1", "train/cat/2", "train/dog/1", "test/cat/1", "val/dog/1"),
    "splits and classes of their names": ("train/cat/1", "train/train/1", "train/test/2", "train/3", "test/cat/1"),
    "both names of the split": ("train/cat/1", "training/dog/1", "training/dog/2"),
    "with capitals": ("Train/cat/1", "Test/cat/1", "TEST/2", "cat/1"),
    "none of them": ("cat/1", "dog/1"),
}
JOBS = [
    ("cat", "dog"),
    ("cat", "dog", "test"),
    ("cat", "dog", "train"),
    ("cat", "train", "test", "val"),
    ("train", "test"),
    ("2026", "2027"),
    ("Train", "cat"),
    ("TEST", "Test", "cat"),
]
LIMITS = LimitsSection(samples_per_device=100, devices=2)


def reported(root: Path) -> DeviceReport:
    """What a device with this data says before it knows the job."""
    summary = scan(root, None)
    return DeviceReport(
        "a",
        "a",
        report_of("a").budget,
        summary.sample_count,
        summary.class_counts,
        class_names=summary.classes,
        folder_names=tuple(summary.folders),
        folder_counts=tuple(summary.folders.values()),
    )


@pytest.mark.parametrize("job", JOBS, ids="-".join)
@pytest.mark.parametrize("tree", TREES)
def test_a_report_counts_for_every_job_what_the_device_will_train_on(
    tmp_path: Path, tree: str, job: tuple[str, ...]
) -> None:
    put(tmp_path, {f"{name}.png": b"x" for name in TREES[tree]})
    counted = counted_for(reported(tmp_path), job)
    objection = check_report(counted, job, LIMITS)
    try:
        summary = scan(tmp_path, job)
    except DataError as error:
        assert objection, error
        return
    assert objection == ""
    assert counted.sample_count == summary.sample_count == scan(tmp_path, None).count_for(job)
    counts = dict(zip(counted.class_names, counted.class_counts, strict=True))
    assert tuple(counts.get(name, 0) for name in job) == summary.class_counts
    spec = ModelSpec("m", job, (1, 4, 4), (0.0,), (1.0,))
    assert lacking_classes(counted, spec) == tuple(name for name in job if not counts.get(name))


def test_what_a_job_may_count_is_said_and_checked_before_the_job_is_known(tmp_path: Path) -> None:
    put(tmp_path / "data", dict.fromkeys((f"cat/{number}.png" for number in range(9)), IMAGE))
    put(tmp_path / "data", {"test/1.png": IMAGE, "test/2.png": cut, "test/3.png": IMAGE})
    samples, logs = look(tmp_path)
    assert (samples.count, samples.count_for(("cat", "test")), samples.count_for(("cat", "dog"))) == (9, 11, 9)
    assert samples.folders == {"cat": 9, "test": 2}
    said = "folder 'test' (images: 2) counts for a job that has such a class; to others it is a split"
    assert [line["note"] for line in logs if "note" in line] == [said]
    assert [line for line in logs if line["event"] == "damaged"] == []  # of what may never be read
    assert len(samples.damage.damaged) == 1


def test_a_device_whose_images_lie_in_no_class_folder_is_told_where_they_lie(tmp_path: Path) -> None:
    put(tmp_path, {"train/1.png": b"x", "test/1.png": b"x"})
    told = check_report(counted_for(reported(tmp_path), ("a", "b")), ("a", "b"), LIMITS)
    assert told == (
        "the device has images in 'train', 'test', and none in a folder of a class of the job; make a folder for each "
        "class"
    )


def test_an_agent_that_says_no_folders_counts_as_before(tmp_path: Path) -> None:
    report = report_of("a")
    assert counted_for(report, ("train", "test")) is report
