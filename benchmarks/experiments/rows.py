"""Data of rows for experiments: texts of AG News (Zhang et al., arXiv 1509.01626) and the table of 53,940 diamonds that
ggplot2 and plotnine ship, whose quality of cut is to be told from the rest."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np

AG_NEWS = """\
classes = ["World", "Sports", "Business", "Sci/Tech"]
first_label = 1

[text]
label = "label"
text = ["title", "description"]
length = 48
"""

DIAMONDS = """\
classes = ["Fair", "Good", "Very Good", "Premium", "Ideal"]

[table]
label = "cut"
numeric = ["carat", "depth", "table", "price", "x", "y", "z"]
categorical.color = ["D", "E", "F", "G", "H", "I", "J"]
categorical.clarity = ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"]
"""

_SEED = 1  # of the order: the same rows for every seed of a run
_COLUMNS = ("label", "title", "description")


def ag_news(file: Path, count: int, folder: Path) -> Path:
    """So many rows for training, and the others for tests. `file` is gzipped CSV without a line of names."""
    with gzip.open(file, "rt", encoding="utf-8", newline="") as lines:
        return _split(_COLUMNS, list(csv.reader(lines)), count, folder)


def diamonds(file: Path, count: int, folder: Path) -> Path:
    """So many rows for training, a quarter as many for tests. `file` is plotnine/data/diamonds.csv."""
    with file.open(encoding="utf-8", newline="") as lines:
        names, *rows = csv.reader(lines)
    return _split(names, rows, count, folder, count // 4)


def _split(names: Sequence[str], rows: Sequence[list[str]], count: int, folder: Path, tests: int | None = None) -> Path:
    order = np.random.default_rng(_SEED).permutation(len(rows))
    last = None if tests is None else count + tests
    folder.mkdir(parents=True, exist_ok=True)
    for split, places in (("train", order[:count]), ("test", order[count:last])):
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as written:
            csv.writer(written).writerows([names, *(rows[place] for place in places)])
    return folder
