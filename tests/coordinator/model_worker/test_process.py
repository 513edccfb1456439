import asyncio
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from coordinator.model_worker import process
from fedepth import evaluation
from fedepth.child import Child, module_argv
from fedepth.data.read import open_images
from fedepth.errors import ChildError, ModelError
from fedepth.export.samples import EXPORT_SAMPLES
from fedepth.job_sections import HIGHEST_OPSET, LOWEST_OPSET, ExportSection
from fedepth.layout import ModelLayout
from fedepth.models.traced import read_traced
from fedepth.prepare import trace_model
from fedepth.task import ModelSpec, TrainingSpec
from fedepth.weights import load_numpy, save

SPEC = ModelSpec("digits-cnn", tuple("0123456789"), (1, 8, 8), (0.3,), (0.35,))
TRAINING = TrainingSpec(32, 1, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 0)


def ask(do: str, **fields: Any) -> dict[str, Any]:
    """The answer to one request, through JSON on both ways."""
    return talk(do, **fields)[-1]


def talk(do: str, **fields: Any) -> list[dict[str, Any]]:
    """All that is written for one request, without `ready`."""
    answers = io.BytesIO()
    process.serve(io.BytesIO(msgspec.json.encode({"do": do, **fields}) + b"\n"), answers)
    ready, *told = (json.loads(line) for line in answers.getvalue().splitlines())
    assert ready == {"event": "ready"}
    return told


def prepare(folder: Path, spec: ModelSpec = SPEC, seed: int = 0) -> list[dict[str, Any]]:
    graph, output = str(folder / "graph.json"), str(folder / "weights.safetensors")
    return talk("prepare", model=spec, training=TRAINING, seed=seed, weights="", graph=graph, output=output)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prepared model: preparing takes seconds."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder)
    return folder


def always_class(ready: Path, path: Path, label: int) -> Path:
    """Weights whose classifier gives one class, whatever it sees."""
    weights = load_numpy(ready / "weights.safetensors")
    weights["head.2.weight"] = np.zeros_like(weights["head.2.weight"])
    weights["head.2.bias"] = 100 * np.eye(10, dtype=np.float32)[label]
    save(path, weights)
    return path


def test_prepare_writes_graph_and_weights_and_says_what_they_are(tmp_path: Path) -> None:
    *progress, answer = prepare(tmp_path / "new")
    told = answer["ok"]
    assert [each["event"] for each in progress] == ["progress"] * 5
    assert progress[2]["text"] == "comparing 6 units with the model"
    data, graph = ((tmp_path / "new" / name).read_bytes() for name in ("weights.safetensors", "graph.json"))
    assert (told["size_bytes"], told["graph_bytes"]) == (len(data), len(graph))
    assert told["digest"] == hashlib.sha256(data).hexdigest()
    assert told["graph_digest"] == hashlib.sha256(graph).hexdigest()
    layout = msgspec.convert(told["layout"], ModelLayout)
    weights = load_numpy(tmp_path / "new" / "weights.safetensors")
    assert {t.name: t.shape for t in layout.tensors} == {n: a.shape for n, a in weights.items()}
    traced = read_traced(tmp_path / "new" / "graph.json")
    assert [unit.name for unit in traced.costs.units] == [unit.name for unit in layout.units]
    costs = traced.costs
    assert sum(u.parameter_bytes for u in costs.units) + costs.head.parameter_bytes == layout.size_bytes
    assert traced.graph.layout() == layout


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    first, again, other = (
        prepare(tmp_path / str(i), seed=seed)[-1]["ok"]["digest"] for i, seed in enumerate((3, 3, 4))
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("label", [0, 7])
def test_evaluation_counts_and_averages(ready: Path, tmp_path: Path, label: int) -> None:
    weights = always_class(ready, tmp_path / "w", label)
    labels = open_images("digits", SPEC, "test").labels
    graph = str(ready / "graph.json")
    told = ask("evaluate", model=SPEC, graph=graph, weights=str(weights), test_data="digits")["ok"]
    share = float((labels == label).mean())
    assert told["samples"] == len(labels)
    assert told["accuracy"] == pytest.approx(share)
    assert told["loss"] == pytest.approx(100 * (1 - share), rel=1e-5)


@pytest.mark.parametrize("most", [0.05, 0.5])
def test_damaged_test_images_are_left_out_up_to_a_share(ready: Path, tmp_path: Path, most: float) -> None:
    for name in "012":
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "test" / name / "x.png")
    (tmp_path / "test/2/x.png").write_bytes(b"damaged")
    graph, weights = str(ready / "graph.json"), str(always_class(ready, tmp_path / "w", 1))
    request = {"model": SPEC, "graph": graph, "weights": weights, "test_data": str(tmp_path), "most_damaged": most}
    *said, told = talk("evaluate", **request)
    if most < 0.3:
        assert told["error"]["type"] == "DataError"
        assert "1 of 3 image files are damaged (33%), and [test] most_damaged allows 5%" in told["error"]["message"]
        return
    assert (told["ok"]["samples"], told["ok"]["accuracy"]) == (2, 0.5)
    assert "1 of 3 test images are damaged and left out, such as:" in said[-1]["text"]


def test_batches_do_not_change_an_evaluation(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, weights = str(ready / "graph.json"), str(ready / "weights.safetensors")
    request = {"model": SPEC, "graph": graph, "weights": weights, "test_data": "digits"}
    whole = ask("evaluate", **request)["ok"]
    monkeypatch.setattr(evaluation, "LARGEST_BATCH", 37)
    assert ask("evaluate", **request)["ok"] == pytest.approx(whole, rel=1e-5)


def test_export_reports_its_parity(ready: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256((ready / "weights.safetensors").read_bytes()).hexdigest()
    output = tmp_path / "models" / "digits.onnx"
    told = ask(
        "export",
        model=SPEC,
        graph=str(ready / "graph.json"),
        weights=str(ready / "weights.safetensors"),
        weights_digest=digest,
        job="digits",
        round=2,
        test_data="digits",
        output=str(output),
    )["ok"]
    assert told["path"] == str(output)
    assert told["size_bytes"] == output.stat().st_size
    assert told["samples"] == EXPORT_SAMPLES
    assert told["top1_equal"] + told["ties"] == told["samples"]
    assert 0 <= told["parity_max_abs"] <= 1e-4
    assert digest.encode() in output.read_bytes()


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"do": "sing"}, "ProtocolError", "'sing'.*prepare, evaluate, check_export, export"),
        ({}, "ProtocolError", "None"),
        ({"do": "evaluate", "model": SPEC, "graph": "g", "weights": 3, "test_data": "x"}, "ProtocolError", "weights"),
        (
            {"do": "evaluate", "model": SPEC, "graph": "/missing", "weights": "w", "test_data": "x"},
            "ModelError",
            "/missing",
        ),
    ],
)
def test_errors_have_their_class_and_message(fields: dict[str, Any], kind: str, message: str) -> None:
    told = ask(**{"do": None, **fields})["error"]
    assert told["type"] == kind
    assert re.search(message, told["message"])


def test_a_model_that_does_not_exist_is_a_model_error(tmp_path: Path) -> None:
    unknown = ModelSpec("nothing", SPEC.classes, SPEC.input_shape, SPEC.mean, SPEC.std)
    answer = prepare(tmp_path / "new", unknown)[-1]
    assert answer["error"]["type"] == "ModelError"
    assert not (tmp_path / "new").exists()


def test_what_nobody_expected_is_one_sentence_that_names_the_file_with_its_trace(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pages = "pages\nof text"

    def broken(*_: object) -> None:
        raise ZeroDivisionError(pages)

    monkeypatch.setattr("fedepth.prepare.trace_costs", broken)
    monkeypatch.setenv("FEDEPTH_BUGS", str(tmp_path / "bugs"))
    with pytest.raises(ModelError) as caught:
        trace_model(SPEC, TRAINING, seed=1)
    assert re.search(r"cannot be prepared.*: ZeroDivisionError: pages; this error is unexpected", str(caught.value))
    assert "of text" not in str(caught.value)
    assert capfd.readouterr().err == ""
    (kept,) = tmp_path.glob("bugs/*.txt")
    assert f"its trace is in {kept}" in str(caught.value)
    assert "Traceback" in kept.read_text()


def test_an_operator_set_is_tried_without_an_export(
    ready: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fields = {"model": SPEC, "graph": str(ready / "graph.json"), "weights": str(ready / "weights.safetensors")}
    monkeypatch.chdir(tmp_path)
    assert ask("check_export", **fields, choices=ExportSection(opset=HIGHEST_OPSET))["ok"] == {}
    monkeypatch.setattr("fedepth.export.opset._needed", lambda node, written, constants: 18)
    told = ask("check_export", **fields, choices=ExportSection(opset=LOWEST_OPSET))["error"]
    assert told["type"] == "ExportError"
    assert "cannot be exported with opset 13" in told["message"] and "set opset to 18 or more" in told["message"]
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_is_no_json_gets_an_answer() -> None:
    assert process.answer(b"{nonsense\n")["error"]["type"] == "ProtocolError"


def test_the_child_answers_and_ends_with_its_input(tmp_path: Path) -> None:
    """The real process: what libraries and models print must not reach the protocol."""
    (tmp_path / "noisy.py").write_text(
        "import os, sys\n"
        "from fedepth.models.digits import DigitsCNN\n"
        "def build(spec):\n"
        "    print('noise'); sys.stdout.flush(); os.write(1, b'more noise\\n')\n"
        "    return DigitsCNN(1, 10)\n"
    )
    spec = ModelSpec("noisy:build", SPEC.classes, SPEC.input_shape, SPEC.mean, SPEC.std)
    output = tmp_path / "w.safetensors"

    async def converse() -> tuple[Any, Any, int | None]:
        child = await Child.start(
            "model worker", module_argv("coordinator.model_worker.process"), {"PYTHONPATH": str(tmp_path)}
        )
        ready = await child.receive()
        files = {"weights": "", "graph": str(tmp_path / "graph.json"), "output": str(output)}
        await child.send({"do": "prepare", "model": spec, "training": TRAINING, "seed": 0, **files})
        answer = await child.receive()
        while "event" in answer:
            answer = await child.receive()
        await child.stop(grace_s=30)
        with pytest.raises(ChildError) as ended:
            await child.receive()
        return ready, answer, ended.value.returncode

    ready, answer, returncode = asyncio.run(converse())
    assert ready == {"event": "ready"}
    assert answer["ok"]["digest"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert returncode == 0
