"""What is made once for all processes of a test run."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def made_once(place: Path) -> Iterator[Path | None]:
    """Gives a path at which to make a file or a folder, which is then moved to `place`; None if it is there.

    Other processes wait meanwhile. What was not finished is not moved: the next one begins anew.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.with_name(f"{place.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.exists():
            yield None
            return
        partial = place.with_name(f"{place.name}.partial")
        yield partial
        partial.rename(place)
