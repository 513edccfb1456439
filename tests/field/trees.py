"""Folders of images for tests: what lies in them, and one look of a device at them."""

from __future__ import annotations

import asyncio
import io
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from structlog.testing import capture_logs

from edge_client.config import load
from edge_client.data_check.protocol import CheckRequest
from edge_client.samples import Samples
from fedepth.data.check import check_data
from fedepth.data.damage import Damage

Content = bytes | Callable[[Path], Any] | None
FORMATS = {".jpg": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}


def image(name: str, size: int = 4) -> bytes:
    """An image in the format of a name."""
    suffix, data = Path(name).suffix.lower(), io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (size, size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(data, FORMATS.get(suffix) or suffix[1:].upper())
    return data.getvalue()


def IMAGE(path: Path) -> None:
    path.write_bytes(image(path.name))


def cut(path: Path) -> None:
    """An image that was not copied to its end."""
    path.write_bytes(image(path.name, 30)[:-40])


def rotten(path: Path) -> None:
    """A PNG whose ends are sound and whose pixels are not."""
    data = bytearray(image(path.name, 30))
    data[200:300] = bytes(100)
    path.write_bytes(data)


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def bind(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # the name of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def put(root: Path, tree: dict[str, Content]) -> Path:
    for name, content in tree.items():
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        elif content is not None:
            path.write_bytes(content)
    return root


async def checked_here(request: CheckRequest, on_progress: Callable[[int], None]) -> Damage:
    return check_data(Path(request.directory), Path(request.record), decode=request.decode, on_progress=on_progress)


def look(
    root: Path, samples: Samples | None = None, decode: bool = False, **settings: Any
) -> tuple[Samples, list[Any]]:
    """One look at the data of a device, and what it logged."""
    config = load(None, {"data": str(root / "data"), "state": str(root / "state"), **settings})
    samples = samples or Samples(config, checked_here)
    with capture_logs() as logs:
        asyncio.run(samples.look(decode=decode))
    return samples, logs
