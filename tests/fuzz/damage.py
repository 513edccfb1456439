"""Bytes and documents that are almost right, and how many of them are tried.

The suite tries a few, the same ones every time. FEDEPTH_FUZZ_EXAMPLES=20000 tries that many of each, others every time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_WANTED = int(os.environ.get("FEDEPTH_FUZZ_EXAMPLES", "0"))
_SECONDS = 5  # for one example, on a machine that is busy; what has no bound takes longer

LITTLE = bytes(range(9)) + b'\xff\x7f\x80"\\[]{},:\n'
NUMBERS = [0, 1, -1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30]
TEXTS = ["", "\x00", "\n", "\x1b[2J", "\u202e", "a" * 300, "../..", "NaN", "é", "0", "F32", "__metadata__"]

scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.floats()
    | st.sampled_from([0.0, -0.0, 1e308, 5e-324])
    | st.sampled_from(TEXTS)
)
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3),
    max_leaves=6,
)


def fuzzing(examples: int) -> Callable[[Any], Any]:
    """How hard a test tries; `examples` in the suite."""
    return settings(
        max_examples=_WANTED or examples,
        derandomize=not _WANTED,
        deadline=_SECONDS * 1000,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with a few bytes lost, changed, put in or repeated, or cut short."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from([0, 1, 2, 8, 64, len(data)]))
        kind = draw(st.sampled_from(["put", "change", "lose", "repeat", "cut"]))
        if kind == "put":
            data = data[:at] + draw(st.binary(max_size=12) | st.sampled_from([b"\xff" * 8, LITTLE])) + data[at:]
        elif kind == "change":
            data = data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
        elif kind == "lose":
            data = data[:at] + data[at + length :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + length] * draw(st.sampled_from([2, 3, 30])) + data[at + length :]
        else:
            data = data[:at]
        data = data[: 1 << 16]
    return data


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document with something else in up to three places, something lost, or something twice."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        found = _places(document)
        if not found:
            break
        node, key = draw(st.sampled_from(found))
        kind = draw(st.sampled_from(["other", "elsewhere", "lose", "twice"]))
        if kind == "other":
            node[key] = draw(documents)
        elif kind == "elsewhere":
            other, place = draw(st.sampled_from(found))
            node[key] = json.loads(json.dumps(other[place]))
        elif kind == "lose":
            del node[key]
        elif isinstance(node, list):
            node.insert(key, node[key])
        else:
            node[draw(st.sampled_from(TEXTS))] = node[key]
    return document


def _places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a document."""
    inner = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    return [(node, key) for key, _ in inner] + [place for _, each in inner for place in _places(each)]
