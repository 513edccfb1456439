"""The 1,797 handwritten digits that come with scikit-learn: a data set that needs no download."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedepth.errors import DataError

_SEED = 20230421
_TEST_FRACTION = 0.2


def load_digits(split: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images (n, 8, 8), scaled from 0..16 to 0..255, and labels (n,) of "train" (80 %) or "test" (20 %).

    The split is stratified and always the same.

    Raises:
        DataError: scikit-learn is not installed, or there is no such split.
    """
    if split not in ("train", "test"):
        raise DataError(f"there is no split {split!r} of the digits; splits are train, test")
    try:
        from sklearn import datasets  # tens of MiB that only this data set needs
    except ImportError:
        raise DataError(
            'the data set "digits" comes with scikit-learn, which is missing; install fedepth[demo]'
        ) from None
    bunch: Any = datasets.load_digits()
    labels = bunch.target.astype(np.int64)
    # RandomState, not Generator: its stream is frozen across versions of numpy.
    random = np.random.RandomState(_SEED)
    in_test = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        in_test[members[: round(len(members) * _TEST_FRACTION)]] = True
    wanted = in_test if split == "test" else ~in_test
    images = np.rint(bunch.images[wanted] * (255 / 16)).astype(np.uint8)
    return images, labels[wanted]
