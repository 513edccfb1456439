"""Updates made of small arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedepth.aggregation.updates import ClientUpdate
from fedepth.weights import save


def f4(*values: float) -> Any:
    return np.array(values, np.float32)


def client(folder: Path, name: str, weight: float, *parts: dict[str, Any], steps: int = 1) -> ClientUpdate:
    paths, digests = [], []
    for number, tensors in enumerate(parts):
        paths.append(folder / f"{name}-{number}.safetensors")
        digests.append(save(paths[-1], tensors))
    return ClientUpdate(tuple(paths), weight, tuple(digests), steps)
