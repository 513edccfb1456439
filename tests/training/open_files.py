"""Which files this process has open: caches have no names by which one could look for them."""

import contextlib
from pathlib import Path


def open_files(folder: Path) -> list[Path]:
    """Entries of /proc/self/fd whose files lie, or lay, in `folder`."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one through which this folder is read
            if link.readlink().is_relative_to(folder):
                found.append(link)
    return found
