"""What a restart finds of a job, and which states are refused. Every kind of database and of files does the same."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from coordinator.store.records import Prepared, Store
from coordinator.store.tables import job
from fedepth.errors import StateError
from fedepth.job import model_spec, training_spec


def prepared_in(store: Store, kit: Any) -> Prepared:
    """What a model worker would have found out; the graph lies in its place."""
    store.files.graph().write_bytes(kit.graph)
    return Prepared(kit.layout, training_spec(kit.config(), 1), kit.sha256(kit.graph), len(kit.graph))


def test_a_restart_finds_everything(place: Any, kit: Any) -> None:
    store = place.open()
    prepared = prepared_in(store, kit)
    run_id = store.run_id
    place.add_round(store, 0, b"zero", epsilon=0.25)
    store.record_prepared(prepared)
    store.see_device(kit.report("a"))
    task = kit.task()
    result = place.add_update(store, task)
    store.set_evaluation(0, 0.5, 1.5)
    store.set_export(0, "model.onnx", 1e-7)
    store.close()

    again = place.open()
    assert again.run_id == run_id
    assert again.prepared() == prepared
    latest = again.latest_round()
    assert latest is not None
    assert (latest.round, latest.digest, latest.accuracy) == (0, kit.sha256(b"zero"), 0.5)
    assert (latest.export_path, latest.parity_max_abs, latest.epsilon) == ("model.onnx", 1e-7, 0.25)
    assert again.tasks_of(1) == [replace(task, status="accepted")]
    assert again.updates_of(1) == again.updates() == [result]
    assert again.device_names() == {"a": "board a"}
    assert (again.device_name("a"), again.device_name("b")) == ("board a", "b")
    assert again.weights_of(latest).read_bytes() == b"zero"
    assert place.parts(again, result) == [b"part"]
    again.close()


def test_a_record_is_read_beside_a_running_coordinator(place: Any) -> None:
    store = place.open()
    place.add_round(store, 0)
    reader = place.read()
    assert [each.round for each in reader.rounds()] == [0]
    place.add_round(store, 1)
    assert [each.round for each in reader.rounds()] == [0, 1]
    reader.close()
    store.close()


def test_what_an_older_version_recorded_is_found_out_again(place: Any, kit: Any) -> None:
    store = place.open()
    prepared = prepared_in(store, kit)
    older = msgspec.to_builtins(prepared)
    del older["graph_digest"]
    store._database.write(job.update().values(prepared=msgspec.json.encode(older).decode()))
    assert store.prepared() is None
    store.record_prepared(prepared)
    assert store.prepared() == prepared
    store.close()


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_graph_that_is_not_the_recorded_one_is_made_again(plain: Any, kit: Any, damage: str) -> None:
    store = plain.open()
    store.record_prepared(prepared_in(store, kit))
    path = store.files.graph()
    if damage == "changed":
        path.write_bytes(kit.graph[:-1] + b" ")
    else:
        path.unlink()
    assert store.prepared() is None
    store.close()


def test_two_coordinators_cannot_share_a_state(plain: Any) -> None:
    store = plain.open()
    script = (
        "import sys, pathlib\n"
        "from coordinator.store.files import lock_state\n"
        "from fedepth.errors import StateError\n"
        "try:\n    lock_state(pathlib.Path(sys.argv[1]))\n"
        "except StateError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", script, str(plain.folder)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "is in use by another coordinator (process " in told
    store.close()
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


@pytest.mark.parametrize("changes", [{"name": "other"}, {"classes": ("0", "1", "2")}, {"input_shape": (3, 8, 8)}])
def test_the_state_of_another_job_is_refused(plain: Any, kit: Any, changes: dict[str, Any]) -> None:
    plain.open().close()
    other = replace(model_spec(kit.config()), **changes)
    with pytest.raises(StateError, match=next(iter(changes))):
        Store.open(plain.folder, "demo", other)
    plain.open().close()  # the refusal gave the lock back


def test_reading_a_folder_without_a_job_is_told(plain: Any) -> None:
    with pytest.raises(StateError, match="holds no job"):
        plain.read()
    with pytest.raises(StateError, match="holds no job"):
        plain.repair()
    assert not plain.folder.exists()
