"""The durable state: what a restart finds, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator.store.records import Prepared, Store
from coordinator.store.tables import job, open_engine
from fedepth.errors import StateError
from fedepth.job import model_spec, training_spec


def open_store(folder: Path, kit: Any) -> Store:
    return Store.open(folder, "demo", model_spec(kit.config()))


def prepared_in(store: Store, kit: Any) -> Prepared:
    """What a model worker would have found out; the graph lies in its place."""
    store.files.graph().write_bytes(kit.graph)
    return Prepared(kit.layout, training_spec(kit.config(), 1), kit.sha256(kit.graph), len(kit.graph))


def add_round(store: Store, number: int, content: bytes) -> None:
    partial = store.directory / "weights" / "new.partial"
    partial.write_bytes(content)
    store.record_round(store.seal_weights(partial, number, 2, 40))


def test_a_restart_finds_everything(tmp_path: Path, kit: Any) -> None:
    store = open_store(tmp_path, kit)
    prepared = prepared_in(store, kit)
    run_id = store.run_id
    add_round(store, 0, b"zero")
    store.record_prepared(prepared)
    store.see_device(kit.report("a"))
    task = kit.task()
    store.record_task(task)
    result = kit.result(task, {0: b"part"})
    store.record_update(result)
    store.set_evaluation(0, 0.5, 1.5)
    store.set_export(0, "model.onnx", 1e-7)
    store.close()

    again = open_store(tmp_path, kit)
    assert again.run_id == run_id
    assert again.prepared() == prepared
    latest = again.latest_round()
    assert latest is not None
    assert (latest.round, latest.digest, latest.accuracy) == (0, kit.sha256(b"zero"), 0.5)
    assert (latest.export_path, latest.parity_max_abs) == ("model.onnx", 1e-7)
    assert again.tasks_of(1) == [replace(task, status="accepted")]
    assert again.updates_of(1) == [result]
    assert again.device_names() == {"a": "board a"}
    again.verify_latest()
    again.close()


def test_what_an_older_version_recorded_is_found_out_again(tmp_path: Path, kit: Any) -> None:
    store = open_store(tmp_path, kit)
    prepared = prepared_in(store, kit)
    older = msgspec.to_builtins(prepared)
    del older["graph_digest"]
    store._write(job.update().values(prepared=msgspec.json.encode(older).decode()))
    assert store.prepared() is None
    store.record_prepared(prepared)
    assert store.prepared() == prepared
    store.close()


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_graph_that_is_not_the_recorded_one_is_made_again(tmp_path: Path, kit: Any, damage: str) -> None:
    store = open_store(tmp_path, kit)
    store.record_prepared(prepared_in(store, kit))
    path = store.files.graph()
    if damage == "changed":
        path.write_bytes(kit.graph[:-1] + b" ")
    else:
        path.unlink()
    assert store.prepared() is None
    store.close()


def test_commits_are_synchronous_and_in_wal_mode(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "job.sqlite")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
    engine.dispose()


def test_two_coordinators_cannot_share_a_state(tmp_path: Path, kit: Any) -> None:
    store = open_store(tmp_path, kit)
    script = (
        "import sys, pathlib\n"
        "from coordinator.store.files import lock_state\n"
        "from fedepth.errors import StateError\n"
        "try:\n    lock_state(pathlib.Path(sys.argv[1]))\n"
        "except StateError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "is in use by another coordinator (process " in told
    store.close()
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


@pytest.mark.parametrize("changes", [{"name": "other"}, {"classes": ("0", "1", "2")}, {"input_shape": (3, 8, 8)}])
def test_the_state_of_another_job_is_refused(tmp_path: Path, kit: Any, changes: dict[str, Any]) -> None:
    open_store(tmp_path, kit).close()
    other = replace(model_spec(kit.config()), **changes)
    with pytest.raises(StateError, match=next(iter(changes))):
        Store.open(tmp_path, "demo", other)
    open_store(tmp_path, kit).close()  # the refusal gave the lock back


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_weights_are_told(tmp_path: Path, kit: Any, damage: str) -> None:
    store = open_store(tmp_path, kit)
    add_round(store, 0, b"zero")
    path = store.files.weights(0)
    if damage == "changed":
        path.write_bytes(b"zer0")
    else:
        path.unlink()
    with pytest.raises(StateError, match=r"round-0000\.safetensors is"):
        store.verify_latest()
    store.close()


def test_a_file_that_is_no_database_is_told(tmp_path: Path, kit: Any) -> None:
    (tmp_path / "job.sqlite").write_bytes(b"not a database at all, but long enough to be read as one")
    with pytest.raises(StateError, match=r"job\.sqlite cannot be read"):
        open_store(tmp_path, kit)


def test_failures_are_counted_by_reason(tmp_path: Path, kit: Any) -> None:
    store = open_store(tmp_path, kit)
    store.record_task(kit.task())
    store.end_task("t-0001-0000", "refused", "shape", "wrong")
    store.count_refusal("unknown", "late", "too late")
    store.count_refusal("unknown", "late", "too late")
    assert store.failure_counts() == {"refused/shape": 1, "refused/late": 2}
    assert store.tasks_of(1)[0].status == "refused"
    store.close()


def test_only_spools_of_past_rounds_are_dropped(tmp_path: Path, kit: Any) -> None:
    store = open_store(tmp_path, kit)
    store.record_task(kit.task("t-0001-0000"))
    store.record_task(replace(kit.task("t-0002-0000"), round=2))
    for task in ("t-0001-0000", "t-0002-0000", "stray"):
        folder = store.files.spool(task, 1)
        folder.mkdir()
        (folder / "part-0000.safetensors").write_bytes(b"x")
    store.drop_spools_before(2)
    assert [folder.name for folder in (tmp_path / "spool").iterdir()] == ["t-0002-0000-1"]
    store.close()


def test_reading_a_folder_without_a_job_is_told(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="holds no job"):
        Store.read(tmp_path)
