"""Partitions as a command line names them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedepth.data.read import open_images
from fedepth.data.scan import walk_folders
from fedepth.errors import ConfigError, DataError
from fedepth.simulation.partitions import (
    Partition,
    Share,
    Source,
    class_counts,
    load_partition,
    make_partition,
    save_partition,
)
from fedepth.task import InputType, ModelSpec, TextSpec

SPEC = ModelSpec("digits-cnn", ("cat", "dog"), (1, 8, 8), (0.5,), (0.5,))
LABELS = np.array([0, 0, 0, 1, 1, 1])


def numbers(how: str, clients: int | None = 2, labels: np.ndarray = LABELS) -> dict[str, list[int]]:
    found = make_partition(how, clients, 1, Source("digits", SPEC, labels))
    return {share.id: list(share.samples) for share in found.clients}


@pytest.mark.parametrize("how", ["iid", "dirichlet:0.3", "dirichlet-unbalanced:0.3", "shards:1"])
def test_every_sample_is_dealt_once_and_names_sort_as_numbers(how: str) -> None:
    found = numbers(how)
    assert list(found) == ["client-000", "client-001"]
    assert sorted(place for part in found.values() for place in part) == list(range(6))


def test_shards_of_two_classes_are_the_classes() -> None:
    assert sorted(numbers("shards:1").values()) == [[0, 1, 2], [3, 4, 5]]


def test_a_partition_of_other_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    made = make_partition("iid", 2, 1, Source("digits", SPEC, LABELS))
    save_partition(path, made)
    assert numbers(f"file:{path}", None) == {share.id: list(share.samples) for share in made.clients}
    for labels in (LABELS[:-1], LABELS[::-1].copy()):
        with pytest.raises(ConfigError, match=r"is of other data, with 6 samples, here are [56], or with other labels"):
            numbers(f"file:{path}", None, labels)
    path.write_text('{"how": "", "seed": 0, "samples": 0, "clients": [{"id": "by hand", "samples": [1, 4]}]}')
    assert numbers(f"file:{path}", None, LABELS[::-1].copy()) == {"by hand": [1, 4]}


def test_rows_lie_in_no_folders(tmp_path: Path) -> None:
    spec = ModelSpec("text-transformer", ("a", "b"), (4,), (), (), InputType.TOKENS, text=TextSpec("l", ("t",), 100))
    with pytest.raises(ConfigError, match="needs image files"):
        make_partition("folder:1", None, 0, Source(tmp_path / "rows.csv", spec, LABELS))


def image_folder(folder: Path) -> Source:
    for number, path in enumerate(["cat/ann/1.png", "cat/ben/1.png", "cat/2.png", "dog/ann/1.png", "dog/ben/x/1.png"]):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(target)
    return Source(folder, SPEC, open_images(folder, SPEC, "train").labels)


def keys(source: Source) -> list[tuple[int, str]]:
    walk = walk_folders(Path(source.data), SPEC.classes, "train")
    return [(picture.key, picture.path) for picture in walk]


def test_folders_below_the_classes_may_be_the_owners(tmp_path: Path) -> None:
    source = image_folder(tmp_path)
    found = make_partition("folder:1", None, 0, source)
    values = open_images(tmp_path, SPEC, "train").read(np.arange(5))[:, 0, 0, 0]
    owned = {share.id: sorted(values[list(share.samples)].tolist()) for share in found.clients}
    assert owned == {"ann": [0, 3], "ben": [1, 4]}  # the third image has no owner
    with pytest.raises(ConfigError, match="--clients: leave it out with --partition folder"):
        make_partition("folder:1", 3, 0, source)
    with pytest.raises(DataError, match="no sample has an owner"):
        make_partition("folder:3", None, 0, source)


def test_a_table_may_name_the_owner_of_files_or_of_places(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "data")
    table = tmp_path / "owners.csv"
    table.write_text("file,client\ncat/ann/1.png,site b\ndog/ben/x/1.png,site a\n")
    assert [share.id for share in make_partition(f"csv:{table}", None, 0, source).clients] == ["site a", "site b"]
    table.write_text("index,client\n0,b\n4,a\n1,b\n")
    found = make_partition(f"csv:{table}", None, 0, source)
    assert {share.id: share.samples for share in found.clients} == {"a": (4,), "b": (0, 1)}
    table.write_text("index,client\n0,b\n5,a\n")
    with pytest.raises(ConfigError, match="line 3: '5' is not in the data"):
        make_partition(f"csv:{table}", None, 0, source)
    (damaged,) = (key for key, path in keys(source) if path == "cat/ben/1.png")
    table.write_text("file,client\ncat/ann/1.png,b\ncat/ben/1.png,b\ncat/2.png,a\n")
    left = Source(source.data, SPEC, open_images(tmp_path / "data", SPEC, damage=frozenset({damaged})).labels,
                  frozenset({damaged}))  # fmt: skip
    found = make_partition(f"csv:{table}", None, 0, left)
    assert {share.id: share.samples for share in found.clients} == {"a": (0,), "b": (1,)}
    table.write_text("index,client\n0,b\n")
    with pytest.raises(ConfigError, match="1 samples are damaged and left out, so that places behind them are others"):
        make_partition(f"csv:{table}", None, 0, replace(left, left_out=1))
    table.write_text("index,client\n3,b\n0,b\n3,b\n3,a\n")
    with pytest.raises(
        ConfigError, match="line 5: '3' belongs to 'a' here and to 'b' by line 4; a sample has one client"
    ):
        make_partition(f"csv:{table}", None, 0, source)
    table.write_text('index,client\n0,"' + "b" * 200_000)
    before = csv.field_size_limit(1000)  # of the process: others may have set it
    try:
        with pytest.raises(ConfigError, match="is not CSV: field larger than"):
            make_partition(f"csv:{table}", None, 0, source)
    finally:
        csv.field_size_limit(before)
    table.write_text("place,client\n")
    with pytest.raises(ConfigError, match="needs the columns client, and file or index"):
        make_partition(f"csv:{table}", None, 0, source)


def test_what_was_saved_is_read_again_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    save_partition(path, Partition("iid", 1, 6, (Share("b", (0, 5)), Share("a", ()))))
    assert load_partition(path).clients == (Share("b", (0, 5)), Share("a", ()))
    assert numbers(f"file:{path}", None) == {"b": [0, 5], "a": []}
    with pytest.raises(ConfigError, match="--clients: leave it out with --partition file"):
        numbers(f"file:{path}", 2)
    for clients, message in [
        ([("a", [0]), ("a", [1])], "clients need names, each its own"),
        ([("a", [1, 0])], "the samples of 'a' must be places in rising order, from 0 to 5"),
        ([("a", [6])], "from 0 to 5"),
    ]:
        shares = [{"id": name, "samples": samples} for name, samples in clients]
        path.write_text(json.dumps({"how": "", "seed": 0, "samples": 6, "clients": shares}))
        with pytest.raises(ConfigError, match=message):
            numbers(f"file:{path}", None)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("halves", "--partition 'halves': there are iid, dirichlet:ALPHA"),
        ("iid:0.3", "--partition iid: stands alone, without '0.3'"),
        ("dirichlet", "alpha must be a number above 0, is ''"),
        ("dirichlet:-1", "alpha must be a finite number above 0, is -1"),
        ("shards:x", "must be a whole number, is 'x'"),
        ("folder:1", "needs image files"),
        ("file:/nowhere", "/nowhere cannot be read: No such file"),
    ],
)
def test_what_is_no_partition_is_told(how: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        numbers(how, None if how.startswith(("folder", "file")) else 2)
    with pytest.raises(ConfigError, match="--clients: say how many, for --partition iid"):
        numbers("iid", None)


def test_classes_are_counted_by_client() -> None:
    found = Partition("", 0, 6, (Share("a", (0, 1, 3)), Share("b", (5,))))
    assert class_counts(found, LABELS, 3) == [[2, 1, 0], [0, 1, 0]]
