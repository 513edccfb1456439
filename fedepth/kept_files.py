"""Files that a device keeps for itself from task to task: peers (fedepth.peers) and what encodings have left out
(fedepth.residuals). All that is to be known of one stands in its path, so that one rename keeps it.

No torch: an idle agent loads this.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import msgspec

from fedepth.files import delete, file_digest
from fedepth.task import Task

_HEADER_BYTES = 1 << 20  # what the header of a file may take that the one of the global weights does not
_NAME = re.compile(r"([1-9][0-9]{0,5})-([0-9a-f]{64})\.safetensors")


def kept_name(number: int, digest: str) -> str:
    """`number`: which of several it is, from 1 on. `digest`: sha256 (hex) of the file."""
    return f"{number}-{digest}.safetensors"


def number_and_digest(name: str) -> tuple[int, str] | None:
    """What the name of a file says; None where it is none of these."""
    found = _NAME.fullmatch(name)
    return (int(found[1]), found[2]) if found else None


def model_key(task: Task, *more: str) -> str:
    """Names the job, its run and its model: other classes, or another graph, make other files."""
    named = (task.job, task.run_id, task.model, task.graph_digest, *more)
    return hashlib.sha256(msgspec.json.encode(named)).hexdigest()[:32]


def entries(folder: Path) -> list[Path]:
    """What lies in a folder; nothing where there is none."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself
            raise
        return []


def make_folder(folder: Path, root: Path, log: Any) -> None:
    """Makes a folder below `root`. What is in its way, up to `root` itself, is deleted: nobody else has files there.
    `log` is told of it.

    Raises:
        OSError: it cannot be made.
    """
    way = root
    for part in ("", *folder.relative_to(root).parts):
        way /= part
        if os.path.lexists(way) and not way.is_dir():
            log.warning("it is deleted, since a folder belongs there", file=str(way))
            delete(way)
    folder.mkdir(parents=True, exist_ok=True)


def damage(path: Path, digest: str, task: Task) -> str:
    """What is wrong with a file that should have this digest, and be no larger than the task's model; empty if nothing
    is."""
    try:
        if (size := path.lstat().st_size) > task.weights_bytes + _HEADER_BYTES:
            return f"it has {size} bytes, more than the model, which has {task.weights_bytes}"
        found = file_digest(path, follow=False)
    except OSError as error:
        return error.strerror or str(error)
    return f"its sha256 is {found[:12]}…, expected {digest[:12]}…" if found != digest else ""
