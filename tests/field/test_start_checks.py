"""What keeps a job from being served is said before anything is prepared, and all at once."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fedepth_wire.tls import INSECURE
from PIL import Image

from coordinator import start_checks
from coordinator.evaluation_data import Answer, Request, look
from coordinator.front import ServeOptions
from coordinator.server import serve
from coordinator.start_checks import Findings, disk_findings, examine, examine_test_data, missing_libraries, writable
from coordinator.store.entries import TaskRecord
from coordinator.store.records import RoundRecord, Store
from fedepth.data.idx import write_idx
from fedepth.errors import FedepthError, StartError, StateError, TransportError
from fedepth.job import load_config, model_spec, read_job
from fedepth.job_changes import settings_of
from fedepth.job_sections import JobConfig
from fedepth.plan import Plan, Policy
from fedepth.task import InputType, ModelSpec, TextSpec

JOB = """[job]
name = "demo"
[model]
name = "digits-cnn"
classes = ["cat", "dog", "bird"]
input_shape = [1, 8, 8]
[test]
data = "data"
"""
MIB = 1 << 20


def config_of(folder: Path, text: str = JOB) -> JobConfig:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "job.toml").write_text(text, encoding="utf-8")
    return load_config(folder / "job.toml")


def images(folder: Path, **counts: int) -> None:
    for name, count in counts.items():
        (folder / "test" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (8, 8), number).save(folder / "test" / name / f"{number}.png")


def spoil(folder: Path, damaged: int, **counts: int) -> None:
    images(folder, **counts)
    for number in range(damaged):
        file = folder / "test" / "cat" / f"{number}.png"
        file.write_bytes(b"\x89PNG and no more")


def idx(folder: Path, labels: list[int], shape: tuple[int, ...] = (8, 8)) -> None:
    write_idx(folder / f"t10k-images-idx{1 + len(shape)}-ubyte", np.zeros((len(labels), *shape), np.uint8))
    write_idx(folder / "t10k-labels-idx1-ubyte", np.array(labels, np.uint8))


def cut_short(folder: Path) -> None:
    idx(folder, [0, 1, 2])
    file = folder / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])


# What lies in the data folder, and what is said of it: its counts, or why it cannot be used.
DATA: dict[str, tuple[Callable[[Path], object], tuple[int, ...], str]] = {
    "folders": (lambda folder: images(folder, cat=2, dog=1, bird=3), (2, 1, 3), ""),
    "a class is missing": (lambda folder: images(folder, cat=2, bird=3), (2, 0, 3), ""),
    "IDX": (lambda folder: idx(folder, [0, 1, 2, 2]), (1, 1, 2), ""),
    "nothing": (lambda folder: None, (), "holds no test split"),
    "an empty split": (lambda folder: (folder / "test").mkdir(), (), "holds no images"),
    "only training data": (lambda folder: (folder / "train" / "cat").mkdir(parents=True), (), "holds no test split"),
    "another class": (lambda folder: images(folder, cat=1, cow=1), (), "cow"),
    "a label beyond the classes": (lambda folder: idx(folder, [0, 3]), (), "labels 3; the job has the 3 classes"),
    "a file of IDX that is cut short": (cut_short, (), "is damaged"),
    "half of it damaged": (lambda folder: spoil(folder, 2, cat=2, dog=2), (), "2 of 4 image files are damaged (50%)"),
    "a little of it damaged": (lambda folder: spoil(folder, 1, cat=20, dog=20), (19, 20, 0), ""),
}


ROWS = """[job]
name = "demo"
[model]
name = "text-transformer"
classes = ["cat", "dog", "bird"]
[text]
label = "label"
text = "text"
[test]
data = "test.csv"
"""


@pytest.mark.parametrize(
    ("rows", "counts", "problem"),
    [
        ("label,text\ncat,a\nbird,b\nbird,c\n", (1, 0, 2), ""),
        ("label,text\n" + "cat,a\n" * 20 + "cow,b\n", (20, 0, 0), ""),
        ("label,text\ncat,a\ncow,b\n", (), "1 of 2 rows are damaged (50%), and [test] most_damaged allows 5%"),
        ("label,text\ncow,b\n", (), "holds no test samples: its only row is damaged, such as: "),
        ("label,text\n", (), "holds no test samples"),
        ("name,text\ncat,a\n", (), "has no column 'label'; it has 'name', 'text'"),
        ("", (), "is empty"),
    ],
)
def test_test_data_of_rows(tmp_path: Path, rows: str, counts: tuple[int, ...], problem: str) -> None:
    (tmp_path / "test.csv").write_text(rows)
    answer = look(Request(str(tmp_path / "test.csv"), model_spec(config_of(tmp_path, ROWS))))
    assert answer.class_counts == counts
    assert problem in answer.problem and bool(answer.problem) == bool(problem)
    assert bool(answer.damaged) == ("cow" in rows and not problem)


@pytest.mark.parametrize("name", DATA)
def test_test_data(tmp_path: Path, name: str) -> None:
    make, counts, problem = DATA[name]
    config = config_of(tmp_path)
    make(tmp_path / "data")
    answer = look(Request(config.test.data, model_spec(config)))
    assert answer.class_counts == counts
    assert problem in answer.problem
    assert bool(answer.problem) == bool(problem)
    if problem:
        assert str(tmp_path / "data") in answer.problem


def test_the_look_happens_in_a_child_and_is_told(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    images(tmp_path / "data", cat=2, bird=3)
    found = asyncio.run(examine(config))
    data = tmp_path / "data"
    assert found.problems == ()
    assert found.facts == (f"{data}: 5 test samples: cat 2, dog 0, bird 3",)
    assert found.warnings == (
        f"[test] data: {data} has no sample of 1 of the 3 classes: dog; how well they are told apart is not measured",
    )


def test_what_is_left_out_of_the_test_folder_is_told_by_folder_and_reason(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    images(tmp_path / "data", cat=2, dog=1, bird=3)
    test = tmp_path / "data" / "test"
    (test / "stray.png").write_bytes(b"x")
    (test / "cat" / "Thumbs.db").write_bytes(b"x")
    for name in ("a.heic", "b.heic"):
        (test / "dog" / name).write_bytes(b"x")
    found = asyncio.run(examine_test_data(config))
    assert found.problems == ()
    assert found.warnings == (
        "[test] data: left out of the folder .: 1 × image in no class folder: move it into one, such as stray.png",
        "[test] data: left out of the folder cat: 1 × file of an operating system, such as cat/Thumbs.db",
        "[test] data: left out of the folder dog: 2 × HEIC, which is not read: convert it to JPEG or PNG, such as "
        "dog/a.heic",
    )


def test_what_is_left_out_of_a_folder_of_rows_is_told_too(tmp_path: Path) -> None:
    for name in ("test.csv", "february.csv", "test.ods"):
        (tmp_path / name).write_text("label,text\ncat,one\n")
    spec = ModelSpec("m", ("cat", "dog"), (4,), (), (), InputType.TOKENS, text=TextSpec("label", ("text",), 100))
    answer = look(Request(str(tmp_path), spec))
    assert (answer.problem, answer.class_counts) == ("", (1, 0))
    assert list(map(str, answer.left_out)) == [
        "1 × a file of no split: call it test-….csv, or leave it, such as february.csv",
        "1 × a spreadsheet: save it as CSV, such as test.ods",
    ]


# A class that no folder can be called, and why.
NO_FOLDERS = [
    ("T-shirt/top", "no folder's name holds a slash"),
    ("..", "what has that name is left out (hidden)"),
    (".net", "what has that name is left out (hidden)"),
    ("__MACOSX", "what has that name is left out (folder of an operating system)"),
    ("thumbs.db", "what has that name is left out (file of an operating system)"),
    ("ü" * 128, "a folder's name has at most 255 bytes"),
]


@pytest.mark.parametrize(("name", "why"), NO_FOLDERS, ids=lambda text: text[:12])
def test_a_class_that_can_have_no_folder_is_told_where_data_lie_in_folders(tmp_path: Path, name: str, why: str) -> None:
    config = config_of(tmp_path, JOB.replace('"dog"', f'"{name}"'))
    images(tmp_path / "data", cat=2, bird=3)
    (problem,) = asyncio.run(examine_test_data(config)).problems
    assert why in problem and f"'{name[:5]}" in problem and "[model] classes" in problem


@pytest.mark.parametrize(("name", "why"), NO_FOLDERS, ids=lambda text: text[:12])
def test_it_is_a_class_like_any_other_where_labels_are_numbers(tmp_path: Path, name: str, why: str) -> None:
    config = config_of(tmp_path, JOB.replace('"dog"', f'"{name}"'))
    idx(tmp_path / "data", [0, 1, 2])
    assert asyncio.run(examine_test_data(config)).problems == ()


def test_a_look_that_breaks_off_is_a_problem(tmp_path: Path) -> None:
    found = asyncio.run(examine_test_data(config_of(tmp_path), ["/bin/false"]))
    assert "ended with status 1" in found.problems[0]


def test_the_set_of_digits_has_ten_classes(tmp_path: Path) -> None:
    found = asyncio.run(examine_test_data(config_of(tmp_path, JOB.replace('"data"', '"digits"'))))
    assert found.problems == (
        "[test] data: digits has 10 classes, [model] classes has 3: write classes = 10, or name other data",
    )


def test_models_and_libraries_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def problems(name: str, more: str = "") -> list[str]:
        return missing_libraries(config_of(tmp_path, JOB.replace("digits-cnn", name) + more))

    assert problems("digits-cnn") == []
    assert "there is no model digits-cmm; did you mean digits-cnn?; others are" in problems("digits-cmm")[0]
    assert f"there is no module mynet, looked for in {tmp_path} and where" in problems("mynet:build")[0]
    monkeypatch.chdir(tmp_path)  # where the model worker looks, too
    (tmp_path / "cwd_net.py").touch()
    assert problems("cwd_net:build") == []
    (tmp_path / "mynet.py").touch()
    monkeypatch.chdir("/")
    assert problems("mynet:build") == []
    there = start_checks._can_be_imported
    monkeypatch.setattr(start_checks, "_can_be_imported", lambda module, *folders: module != "onnx" and there(module))
    assert problems("resnet18") == ["onnx is not installed, which the export needs: pip install 'fedepth[coordinator]'"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert writable("--port-file", tmp_path / "port") == []
    assert writable("--port-file", tmp_path) == [f"--port-file: {tmp_path} is a folder; name a file"]
    assert "none does not exist; make it" in writable("--port-file", tmp_path / "none" / "port")[0]
    assert f"{tmp_path / 'file'} is not a folder" in writable("--port-file", tmp_path / "file" / "port")[0]


DISK: list[tuple[int, int, bool, str, str]] = [  # free and weights in MiB, begun, the problem, the warning
    (10_000, 100, False, "", ""),
    (500, 100, False, "", "has 500.0 MiB left; a round of 2 devices and the 3 rounds that are kept"),
    (400, 100, False, "has 400.0 MiB left, the first round needs 464.0 MiB: 2 updates and two models of 100.0 MiB", ""),
    (400, 100, True, "", "has 400.0 MiB left"),
    (500, 100, True, "", ""),
    (65, 0, False, "", ""),
    (63, 0, False, "the first round needs 64.0 MiB: 64.0 MiB for the record", ""),
]


@pytest.mark.parametrize(("free", "weights", "begun", "problem", "warning"), DISK)
def test_disk_space(tmp_path: Path, free: int, weights: int, begun: bool, problem: str, warning: str) -> None:
    found = disk_findings(config_of(tmp_path), free * MIB, weights * MIB, tmp_path, begun)
    assert (bool(found.problems), bool(found.warnings)) == (bool(problem), bool(warning))
    assert problem in " ".join(found.problems)
    assert warning in " ".join(found.warnings)


def begun(state: Path, config: JobConfig) -> None:
    """A job that has its first weights."""
    store = Store.open(state, "demo", model_spec(config), settings=settings_of(config))
    partial = state / "weights" / "new.partial"
    partial.write_bytes(b"weights")
    sealed = store.seal_weights(partial, 0)
    store.record_round(RoundRecord(0, sealed.digest, sealed.size_bytes, 0.0, 0, 0))
    store.close()


class NoModels:
    """No model is to be prepared where the start is refused."""

    async def request(self, do: str, **fields: Any) -> dict[str, Any]:
        raise AssertionError(do)

    async def stop(self) -> None:
        pass


def start(config: JobConfig, options: ServeOptions, found: Findings | None = None) -> FedepthError:
    """The error that a start ends with."""

    async def examined(config: JobConfig) -> Findings:
        return found or Findings()

    with pytest.raises(FedepthError) as caught:
        asyncio.run(serve(config, options, NoModels(), examined))
    return caught.value


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    state = tmp_path / "state"
    begun(state, config)
    changed = msgspec.structs.replace(config, training=msgspec.structs.replace(config.training, batch=64))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = ServeOptions(state, port=port, certificates=INSECURE, port_file=tmp_path / "none" / "port")
        error = start(changed, options, Findings(("[test] data: it is not there",)))
        alone = start(config, ServeOptions(state, port=port, certificates=INSECURE))
    assert isinstance(error, StartError)
    text = str(error)
    assert text.startswith("the job cannot start, for 4 reasons: (1) [test] data: it is not there; (2) --port-file: ")
    assert f"(3) cannot listen on 127.0.0.1:{port}" in text
    assert "[training] batch from 32 to 64, which a job keeps" in text
    assert text.isprintable()
    assert isinstance(alone, TransportError)


def test_what_is_missing_is_told_with_the_rest(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB.replace("[1, 8, 8]", '[1, 8, 8]\nweights = "none.pt"'), encoding="utf-8")
    config, missing = read_job(tmp_path / "job.toml")
    assert (config.test, config.model.weights) == (None, "")
    options = ServeOptions(tmp_path / "state", port=0, certificates=INSECURE, port_file=tmp_path / "none" / "port")
    with pytest.raises(StartError, match="the job cannot start, for 3 reasons: ") as caught:
        asyncio.run(serve(config, options, NoModels(), missing=missing))
    for part in (f"[test] data: {tmp_path / 'data'} does not exist", "[model] weights: ", "--port-file: "):
        assert part in str(caught.value)


def test_a_start_that_is_refused_takes_nothing_over(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    state = tmp_path / "state"
    begun(state, config)
    more = msgspec.structs.replace(config, job=msgspec.structs.replace(config.job, rounds=99))
    start(more, ServeOptions(state, port=0, certificates=INSECURE), Findings(("no",)))
    store = Store.read(state)
    assert store.changes() == []
    store.close()


def test_another_learning_rate_is_asked_about_once_a_task_has_been_handed_out(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    state = tmp_path / "state"
    begun(state, config)
    slower = msgspec.structs.replace(config, training=msgspec.structs.replace(config.training, learning_rate=0.01))
    assert str(start(slower, ServeOptions(state, port=0, certificates=INSECURE), Findings(("no",)))) == "no"
    store = Store.open(state, config.job.name, model_spec(config))
    store.record_task(TaskRecord("a", 1, "device", 1, "given", Plan((), (), Policy.AUTO, 0), 1))
    store.close()
    error = start(slower, ServeOptions(state, port=0, certificates=INSECURE))
    assert isinstance(error, StateError)
    assert "learning_rate from 0.05 to 0.01" in str(error)
    assert "add --accept-changes" in str(error)


def test_a_full_disk_is_told_before_the_model_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=MIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    error = start(config_of(tmp_path), ServeOptions(tmp_path / "state", port=0, certificates=INSECURE))
    assert "has 1.0 MiB left, the first round needs 64.0 MiB" in str(error)


def test_answers_travel() -> None:
    answer = Answer((1, 2), 1, "x.png is empty")
    assert msgspec.json.decode(msgspec.json.encode(answer), type=Answer) == answer
