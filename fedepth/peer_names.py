"""What files of peers are called (fedepth.peers, fedepth.training.peers). No torch: an idle agent loads this."""

from __future__ import annotations

import re

_NAME = re.compile(r"([1-9][0-9]?)-([0-9a-f]{64})\.safetensors")


def peer_name(slot: int, digest: str) -> str:
    """`slot`: which of a device's peers it is, from 1 on. `digest`: sha256 (hex) of the file."""
    return f"{slot}-{digest}.safetensors"


def slot_and_digest(name: str) -> tuple[int, str] | None:
    """What the name of a file says; None where it is none of a peer."""
    found = _NAME.fullmatch(name)
    return (int(found[1]), found[2]) if found else None
