"""The agent's state files after a bad power cut or a failing SD card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.identity import device_id, recall
from edge_client.memory.budget import Share, StartCost
from edge_client.outbox import READ_TRIES, Outbox, _Sealed
from fedepth.errors import StateError
from tests.fuzz.damage import changed, damaged, fuzzing
from tests.fuzz.test_messages import VALUES

SEALED = msgspec.json.encode(_Sealed(3, VALUES[1]))


def outbox_of(state: Path, entry: bytes) -> Outbox:
    shutil.rmtree(state, ignore_errors=True)
    folder = state / "outbox" / "t-1"
    folder.mkdir(parents=True)
    (folder / "entry.json").write_bytes(entry)
    (folder / "part-0000.safetensors").write_bytes(b"x")
    return Outbox(state)


@fuzzing(150)
@given(
    damaged(SEALED)
    | changed(json.loads(SEALED)).map(lambda document: json.dumps(document).encode("utf-8", "surrogatepass"))
)
def test_an_entry_is_whole_or_set_aside(tmp_path_factory: pytest.TempPathFactory, entry: bytes) -> None:
    state = tmp_path_factory.getbasetemp() / "state"
    outbox = outbox_of(state, entry)
    for kept in outbox.entries():  # a part of no bytes, with a digest that fits: nothing is impossible
        assert kept.folder.name == f"{kept.result.task_id}-{kept.result.attempt}"
    assert outbox.entries() == outbox.entries()
    assert len(list((state / "outbox").iterdir())) + len(list((state / "damaged").glob("*"))) == 1


@pytest.mark.parametrize("kind", ["missing", "a folder", "a link to itself"])
def test_an_entry_that_is_no_file_is_set_aside(tmp_path: Path, kind: str) -> None:
    outbox = outbox_of(tmp_path / "state", SEALED)
    path = tmp_path / "state" / "outbox" / "t-1" / "entry.json"
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a link to itself":
        path.symlink_to(path)
    for _ in range(READ_TRIES):  # a disk may fail once
        assert outbox.entries() == []
    assert (tmp_path / "state" / "damaged" / "t-1.0").is_dir()


@fuzzing(100)
@given(st.binary(max_size=60) | damaged(b"9f0c1a9e-7c1c-4a52-9d3e-0c5b8f6f7a11\n"))
def test_an_identity_is_an_identity_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    state = tmp_path_factory.getbasetemp()
    (state / "device-id").write_bytes(data)
    try:
        assert len(device_id(state)) == 36
    except StateError as error:
        assert len(str(error)) < 300 + len(str(state))


@pytest.mark.parametrize("name", ["a folder", "a link to itself"])
def test_an_identity_that_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "device-id"
    if name == "a folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    with pytest.raises(StateError, match="device-id"):
        device_id(tmp_path)


@fuzzing(100)
@given(damaged(b'{"torch": "2.5", "start_bytes": 300, "share": 0.5}'), st.sampled_from([StartCost, Share]))
def test_what_can_be_learnt_again_is_remembered_or_forgotten(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, kind: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "small.json"
    path.write_bytes(data)
    assert recall(path, kind) is None or isinstance(recall(path, kind), kind)


def test_a_memory_that_is_no_file_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "start.json").mkdir()
    assert recall(tmp_path / "start.json", StartCost) is None
    (tmp_path / "share.json").symlink_to(tmp_path / "share.json")
    assert recall(tmp_path / "share.json", Share) is None
