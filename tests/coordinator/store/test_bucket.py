"""A bucket keeps what a coordinator needs to start on an empty disk; what lies on the disk is a working copy."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Callable
from typing import Any

import pytest
import s3fs

from coordinator.store import bucket
from coordinator.store.records import Prepared
from fedepth.errors import StateError, UnavailableError
from fedepth.job import training_spec
from fedepth.job_sections import RetentionSection


@pytest.fixture
def far(plain: Any, new_bucket: Callable[[], str]) -> Any:
    """SQLite in the state directory, files in a bucket."""
    plain.files = new_bucket()
    return plain


def objects(far: Any) -> dict[str, bytes]:
    system = s3fs.S3FileSystem(use_listings_cache=False)
    prefix = far.files.removeprefix("s3://")
    return {name[len(prefix) + 1 :]: system.cat_file(name) for name in system.find(prefix)}


def begun(far: Any) -> Any:
    store = far.open()
    store.files.graph().write_bytes(far.kit.graph)
    graph = (far.kit.sha256(far.kit.graph), len(far.kit.graph))
    store.record_prepared(Prepared(far.kit.layout, training_spec(far.kit.config(), 1), *graph))
    far.add_round(store, 0)
    export = store.files.export("demo", 0)
    export.write_bytes(b"onnx")
    store.set_export(0, str(export), 0.0)
    far.refuse_round(store, 1, b"worse")
    far.add_update(store, far.task(2, "a"), b"an update")
    store.record_task(far.task(2, "b"))
    far.part(store, far.task(2, "b"), b"not committed")
    return store


def test_what_is_recorded_is_in_the_bucket(far: Any) -> None:
    store = begun(far)
    zero, worse = (far.kit.sha256(content)[:12] for content in (b"weights 0", b"worse"))
    assert objects(far) == {
        "model/graph.json": far.kit.graph,
        f"weights/round-0000-{zero}.safetensors": b"weights 0",
        f"weights/round-0001-{worse}.aside.safetensors": b"worse",
        "exports/demo-round-0000.onnx": b"onnx",
        "spool/t-0002-a-1/part-0000.safetensors": b"an update",
    }
    far.add_round(store, 2)
    store.prune(RetentionSection(keep_last=1, keep_best=False))
    two = far.kit.sha256(b"weights 2")[:12]
    assert set(objects(far)) == {
        "model/graph.json",
        f"weights/round-0001-{worse}.aside.safetensors",
        f"weights/round-0002-{two}.safetensors",
    }
    store.close()


def test_a_coordinator_starts_on_an_empty_disk(far: Any, postgres: Any) -> None:
    far.database = postgres.new_database()
    begun(far).close()
    shutil.rmtree(far.folder)
    store = far.open()
    assert store.prepared() is not None
    assert store.files.graph().read_bytes() == far.kit.graph
    assert store.weights_of(store.latest_round()).read_bytes() == b"weights 0"
    (update,) = store.updates_of(2)
    assert (store.files.spool("t-0002-a", 1) / "part-0000.safetensors").read_bytes() == b"an update"
    assert far.parts(store, update) == [b"an update"]
    far.add_round(store, 2)
    store.close()


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_working_copy_is_fetched_again(far: Any, damage: str) -> None:
    store = begun(far)
    path = store.files.weights(0, far.kit.sha256(b"weights 0"))
    part = store.files.spool("t-0002-a", 1) / "part-0000.safetensors"
    for each in (path, part):
        if damage == "changed":
            each.write_bytes(b"x" * each.stat().st_size)
        else:
            each.unlink()
    (update,) = store.updates_of(2)
    assert store.weights_of(store.latest_round()).read_bytes() == b"weights 0"
    assert far.parts(store, update) == [b"an update"]
    store.close()


def test_damage_on_both_sides_is_refused(far: Any) -> None:
    store = begun(far)
    name = f"weights/round-0000-{far.kit.sha256(b'weights 0')[:12]}.safetensors"
    store.files.path(name).unlink()
    s3fs.S3FileSystem(use_listings_cache=False).pipe_file(f"{far.files}/{name}", b"weights X")
    with pytest.raises(StateError, match=rf"{far.files}/{name} is damaged: its sha256"):
        store.weights_of(store.latest_round())
    s3fs.S3FileSystem(use_listings_cache=False).rm_file(f"{far.files}/{name}")
    with pytest.raises(StateError, match=rf"{far.files}/{name} is missing, and so is a sound copy"):
        store.weights_of(store.latest_round())
    assert [path for path in (far.folder / "weights").iterdir() if path.suffix == ".tmp"] == []
    store.close()


def test_a_job_moves_from_the_directory_to_a_bucket(far: Any) -> None:
    bucket, far.files = far.files, ""
    begun(far).close()
    far.files = bucket
    assert objects(far) == {}
    far.open().close()
    zero = far.kit.sha256(b"weights 0")[:12]
    assert set(objects(far)) == {
        "model/graph.json",
        f"weights/round-0000-{zero}.safetensors",
        "spool/t-0002-a-1/part-0000.safetensors",
    }


def test_a_bucket_of_another_job_is_refused(far: Any, tmp_path: Any) -> None:
    begun(far).close()
    far.folder = tmp_path / "another"
    with pytest.raises(StateError, match="holds weights of rounds 0 and 1 that"):
        far.open()


def test_a_service_that_does_not_answer_is_told(far: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "_CONFIG", {**bucket._CONFIG, "read_timeout": 0.2})
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        with pytest.raises(UnavailableError, match=r"s3://test-.* cannot be reached now: \S.*; see that"):
            far.open()
        deaf.settimeout(0)
        tries = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                deaf.accept()[0].close()
                tries += 1
        assert tries == bucket.TRIES
    assert bucket.TRIES * (bucket.CONNECT_S + bucket.READ_S) <= 30


def test_a_bucket_that_is_not_there_is_told(far: Any) -> None:
    far.files = "s3://no-such-bucket/demo"
    store = None
    with pytest.raises(UnavailableError, match=r"s3://no-such-bucket/demo/.* cannot be reached now"):
        store = far.open()
        far.add_round(store, 0)
    if store is not None:
        store.close()


@pytest.mark.parametrize("url", ["http://host/x", "bucket", "s3://key:secret@bucket/x"])
def test_other_urls_are_refused_and_no_key_is_shown(far: Any, url: str) -> None:
    far.files = url
    with pytest.raises(StateError, match="--files must be a URL such as s3://bucket/prefix") as refused:
        far.open()
    assert "secret" not in str(refused.value)
