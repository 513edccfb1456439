"""A calibration of the simulator: FedAvg as in Flower's baseline niid_bench (github.com/adap/flower, after Li et al.,
arXiv 2102.02079), whose authors publish 88.09 ± 0.29 % on Fashion-MNIST and 62.47 ± 0.43 % on CIFAR-10.

As there: LeNet, 10 clients that all take part in every round, Dirichlet(0.5) with unequal sizes, 50 rounds of 10 local
epochs, batch 64, SGD at 0.01 with momentum 0.9 and weight decay 1e-5, pixels from 0 to 1, the best accuracy of all
rounds; on CIFAR-10 crops and flips. Different here: crops are padded with black pixels, there with reflected ones;
CIFAR-10 is a copy of JPEG files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.runs import Scale
from fedepth.data.idx import write_idx
from fedepth.data.partition import Indices
from fedepth.data.read import Labels, open_images
from fedepth.simulation.partitions import Partition, Share, save_partition
from fedepth.task import ModelSpec

LENET = Path(__file__).with_name("lenet.py")
PUBLISHED = {"niid_bench_fashion": (0.8809, 0.0029), "niid_bench_cifar10": (0.6247, 0.0043)}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_ALPHA = 0.5
_LEAST = 10  # samples of a client; as long as one has fewer, all are dealt again
_PIECE = 1000
_SEED = 1  # of the images that are taken where not all are


def dealt(labels: Labels, clients: int, seed: int) -> list[Indices]:
    """The partition of NIID-Bench: each class in shares from Dirichlet(0.5), of which those get nothing who have an
    equal share of all samples already."""
    rng = np.random.default_rng(seed)
    while True:
        parts: list[list[int]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(clients, _ALPHA))
            shares *= [len(part) < len(labels) / clients for part in parts]
            ends = (np.cumsum(shares / shares.sum()) * len(members)).astype(np.int64)
            for part, piece in zip(parts, np.split(members, ends[:-1]), strict=True):
                part.extend(piece.tolist())
        if min(map(len, parts)) >= _LEAST:
            return [np.array(sorted(part), np.int64) for part in parts]


def write_partition(path: Path, labels: Labels, clients: int, seed: int) -> None:
    """Who has what, for `fedepth simulate --partition file:PATH`."""
    shares = (
        Share(f"client-{number:03d}", tuple(part.tolist())) for number, part in enumerate(dealt(labels, clients, seed))
    )
    save_partition(path, Partition("niid_bench", seed, len(labels), tuple(shares)))


def cifar10(images: Path, count: int, folder: Path) -> Path:
    """Class folders of CIFAR-10, DIR/train/CLASS and DIR/test/CLASS, as IDX files: JPEG need not be decoded in every
    epoch. Of the training images `count` as they come in a drawn order, or all where there are fewer."""
    spec = ModelSpec("cifar10", CLASSES, (3, 32, 32), (0.0,) * 3, (1.0,) * 3)
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "train"), ("test", "t10k")):
        target = folder / f"{name}-images-idx4-ubyte"
        if target.exists():
            continue
        found = open_images(images, spec, split)
        chosen = np.arange(len(found))
        if split == "train" and count < len(found):
            chosen = np.sort(np.random.default_rng(_SEED).permutation(len(found))[:count])
        pieces = np.split(chosen, range(_PIECE, len(chosen), _PIECE))
        write_idx(folder / f"{name}-labels-idx1-ubyte", found.labels[chosen].astype(np.uint8))
        write_idx(target, np.ascontiguousarray(np.concatenate([found.read(piece) for piece in pieces])))
    return folder


def job_lines(scale: Scale) -> str:
    """What such a job has in its section [training] beyond the others."""
    augmentation = "crop-flip" if scale.input_shape[0] == 3 else "none"
    return f'weight_decay = 1e-5\naugmentation = "{augmentation}"'
