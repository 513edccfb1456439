"""How the samples of one data set are dealt to clients: said on a command line, saved as JSON, never copied."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from fedepth.data import partition
from fedepth.data.idx_sets import find_idx
from fedepth.data.partition import Indices
from fedepth.data.read import DIGITS, Labels
from fedepth.data.scan import find_folders, walk_folders
from fedepth.errors import ConfigError, DataError
from fedepth.files import NOT_JSON, read_regular, write_atomically
from fedepth.printable import printable, quoted
from fedepth.task import ModelSpec

MOST_BYTES = 1 << 30  # of a file that says who has which samples
FORMS = (
    "iid, dirichlet:ALPHA (equal sizes), dirichlet-unbalanced:ALPHA, shards:EACH, folder:LEVEL, csv:FILE, or file:FILE"
)


_SUFFIXES = {"csv": "csv", "file": "json"}
FROM_FILES = frozenset(_SUFFIXES)  # kinds of partitions that a file says


class Share(msgspec.Struct, frozen=True):
    """The samples of one client, as places in the data set, in rising order."""

    id: str
    samples: tuple[int, ...]


class Partition(msgspec.Struct, frozen=True):
    """Who has which samples.

    Attributes:
        how: as it was asked for.
        samples: in the whole data set.
        labels: digest of their labels (`labels_digest`): places mean nothing in other data. Empty where somebody wrote
            it by hand.
    """

    how: str
    seed: int
    samples: int
    clients: tuple[Share, ...]
    labels: str = ""


def file_of(how: str) -> Path | None:
    """The file that a partition is read from; None where none is.

    Raises:
        ConfigError: it has no name.
    """
    kind, _, argument = how.partition(":")
    if kind not in FROM_FILES:
        return None
    if not argument:
        raise ConfigError(f"--partition {kind}: names a file, as in --partition {kind}:owners.{_SUFFIXES[kind]}")
    return Path(argument)


@dataclass(frozen=True)
class Source:
    """What is dealt: the labels of a data set, and where it lies; without files that are damaged, by their keys.

    Attributes:
        left_out: so many samples were, since they are damaged.
    """

    data: Path | str
    spec: ModelSpec
    labels: Labels
    damage: frozenset[int] = frozenset()
    left_out: int = 0


def make_partition(how: str, clients: int | None, seed: int, source: Source) -> Partition:
    """Deals the samples as `how` says; see `FORMS`.

    Args:
        clients: how many; None where the data says so itself (folder, csv, file).

    Raises:
        ConfigError: `how` is none of the forms, or does not go with `clients`.
        DataError: the data cannot be dealt so.
    """
    kind, _, argument = how.partition(":")
    file = file_of(how)
    if clients is not None and kind in ("folder", "csv", "file"):
        raise ConfigError(f"--clients: leave it out with --partition {kind}, which says itself who there is")
    if kind == "file" and file is not None:
        return _checked(load_partition(file), source.labels, argument)
    if kind in ("folder", "csv"):
        owners = _owners_by_folder(source, argument) if file is None else _owners_by_csv(source, file)
        named = partition.by_owner(owners)
        if not named:
            raise DataError(f"--partition {how}: no sample has an owner")
    elif kind in _DEALT:
        if clients is None:
            raise ConfigError(f"--clients: say how many, for --partition {how}")
        parts = _DEALT[kind](source.labels, clients, argument, seed)
        width = max(3, len(str(clients - 1)))
        named = {f"client-{number:0{width}d}": part for number, part in enumerate(parts)}
    else:
        raise ConfigError(f"--partition {quoted(how)}: there are {FORMS}")
    shares = tuple(Share(name, tuple(part.tolist())) for name, part in named.items())
    return Partition(how, seed, len(source.labels), shares, labels_digest(source.labels))


def labels_digest(labels: Labels) -> str:
    """Tells data sets apart whose samples are not the same ones, or in another order, as far as labels can."""
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()[:32]


def save_partition(path: Path, found: Partition) -> None:
    """Writes it as JSON, durably."""
    write_atomically(path, msgspec.json.encode(found) + b"\n")


def load_partition(path: Path) -> Partition:
    """Reads what `save_partition` wrote, or a person.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    try:
        return msgspec.json.decode(read_regular(path, MOST_BYTES), type=Partition)
    except OSError as error:
        raise ConfigError(f"--partition: {printable(str(path))} cannot be read: {error.strerror}") from None
    except NOT_JSON as error:
        raise ConfigError(f"--partition: {printable(str(path))} is not a partition: {error}") from None


def _checked(found: Partition, labels: Labels, name: str) -> Partition:
    """The partition of a file, for the samples with these labels."""
    count, digest = len(labels), labels_digest(labels)
    if found.labels not in ("", digest):
        raise ConfigError(
            f"--partition {printable(name)}: is of other data, with {found.samples} samples, here are {count}, or "
            'with other labels; if its places are right all the same, remove "labels" from it'
        )
    ids = [share.id for share in found.clients]
    if not ids or len(set(ids)) != len(ids) or not all(ids):
        raise ConfigError(f"--partition {printable(name)}: clients need names, each its own")
    for share in found.clients:
        order = list(share.samples)
        if order != sorted(set(order)) or (order and not 0 <= order[0] <= order[-1] < count):
            raise ConfigError(
                f"--partition {printable(name)}: the samples of {quoted(share.id)} must be places in rising order, "
                f"from 0 to {count - 1}"
            )
    return msgspec.structs.replace(found, samples=count, labels=digest)


def _alpha(argument: str) -> float:
    try:
        return float(argument)
    except ValueError:
        raise ConfigError(f"--partition: alpha must be a number above 0, is {quoted(argument)}") from None


def _whole(argument: str, what: str) -> int:
    try:
        return int(argument)
    except ValueError:
        raise ConfigError(f"--partition: {what} must be a whole number, is {quoted(argument)}") from None


def _iid(labels: Labels, clients: int, argument: str, seed: int) -> Sequence[Indices]:
    if argument:
        raise ConfigError(f"--partition iid: stands alone, without {quoted(argument)}; there are {FORMS}")
    return partition.iid(len(labels), clients, seed)


_DEALT: dict[str, Callable[[Labels, int, str, int], Sequence[Indices]]] = {
    "iid": _iid,
    "dirichlet": lambda labels, clients, text, seed: partition.dirichlet_balanced(labels, clients, _alpha(text), seed),
    "dirichlet-unbalanced": lambda labels, clients, text, seed: partition.dirichlet(
        labels, clients, _alpha(text), seed
    ),
    "shards": lambda labels, clients, text, seed: partition.shards(
        labels, clients, _whole(text, "the shards of a client"), seed
    ),
}


def _owners_by_folder(source: Source, argument: str) -> list[str]:
    """The name of the folder at a level below the class folders: 1 for CLASS/OWNER/image.png."""
    level = _whole(argument, "the level")
    files = _image_files(source)
    if level < 1 or not files:
        raise ConfigError(
            "--partition folder:LEVEL counts from 1, the folders inside a class folder; needs image files"
        )
    owners = []
    root = walk_folders(Path(source.data), source.spec.classes, "train").root
    for path in files:
        inner = path.relative_to(root).parts[1:-1]  # below the class folder
        owners.append(inner[level - 1] if len(inner) >= level else "")
    return owners


def _owners_by_csv(source: Source, path: Path) -> list[str]:
    """A table with the columns `client` and `file` (a path below the data folder), or `index` (a place in it)."""
    try:
        text = read_regular(path, MOST_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--partition csv: {printable(str(path))} cannot be read: {error}") from None
    try:
        return _owners(source, path, csv.DictReader(io.StringIO(text)))
    except csv.Error as error:  # such as a quotation mark that is not closed
        raise ConfigError(f"--partition csv: {printable(str(path))} is not CSV: {error}") from None


def _owners(source: Source, path: Path, rows: csv.DictReader[str]) -> list[str]:
    columns = set(rows.fieldnames or ())
    if "client" not in columns or not columns & {"file", "index"}:
        raise ConfigError(f"--partition csv: {printable(str(path))} needs the columns client, and file or index")
    if "index" in columns and source.left_out:
        raise ConfigError(
            f"--partition csv: {source.left_out} samples are damaged and left out, so that places behind them are "
            "others than in the data; take them out of the data"
        )
    owners = [""] * len(source.labels)
    lines = [0] * len(owners)
    places: dict[str, int] = {}
    damaged: set[str] = set()
    if "index" not in columns:
        root = Path(source.data)
        places = {str(file.relative_to(root)): place for place, file in enumerate(_image_files(source))}
        whole = _image_files(replace(source, damage=frozenset())) if source.damage else []
        damaged = {str(file.relative_to(root)) for file in whole} - places.keys()
    for row in rows:
        if "index" in columns:
            place: int | None = _whole(row["index"] or "", "an index")
        elif row["file"] in damaged:
            continue
        else:
            place = places.get(row["file"] or "")
        if place is None or not 0 <= place < len(owners):
            what = row.get("index") or row.get("file") or ""
            raise ConfigError(f"--partition csv: line {rows.line_num}: {quoted(what)} is not in the data")
        owner = (row["client"] or "").strip()
        if lines[place] and owners[place] != owner:
            what = row.get("index") or row.get("file") or ""
            raise ConfigError(
                f"--partition csv: line {rows.line_num}: {quoted(what)} belongs to {quoted(owner)} here and to "
                f"{quoted(owners[place])} by line {lines[place]}; a sample has one client"
            )
        owners[place], lines[place] = owner, rows.line_num
    return owners


def _image_files(source: Source) -> list[Path]:
    """The path of every sample, in the order of the data; none where samples are no files."""
    if str(source.data) == DIGITS or source.spec.columns is not None or find_idx(Path(source.data), "train"):
        return []
    found = find_folders(Path(source.data), source.spec.classes, "train", source.damage)
    return [path for paths in found.values() for path in paths]


def class_counts(found: Partition, labels: Labels, classes: int) -> list[list[int]]:
    """Samples of each class (columns) at each client (rows)."""
    counts = [np.bincount(labels[list(each.samples)], minlength=classes) for each in found.clients]
    return [row.tolist() for row in counts]
