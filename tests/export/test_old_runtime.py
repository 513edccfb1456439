"""Exports of the zoo run in the ONNX Runtime that JetPack 5 and 6 users have, in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from fedepth.data.transforms import model_inputs
from fedepth.export.onnx import export, random_samples
from fedepth.job_sections import ExportSection
from fedepth.models import zoo
from fedepth.models.export import export_model
from fedepth.task import ModelSpec
from fedepth.weights import save

OLD = "1.16.3"
RUNNER = Path(__file__).with_name("old_runtime.py")
TEN = tuple("0123456789")


@dataclass(frozen=True)
class Case:
    """A model of the zoo, and how it is exported: every choice occurs."""

    model: str
    shape: tuple[int, int, int]
    choices: ExportSection
    opset: int


CASES = {
    "cnn": Case("digits-cnn", (1, 8, 8), ExportSection(preprocessing=True, output="probabilities"), 14),
    "resnet": Case("preresnet20", (3, 16, 16), ExportSection(precision="float16", preprocessing=True, opset=19), 19),
    "mobilenet": Case("mobilenet-v3-small", (3, 32, 32), ExportSection(), 14),
    # In float16, since the current ONNX Runtime crashes on others (fedepth.export.float16).
    "vit": Case(f"{__name__}:tiny_vit", (3, 16, 16), ExportSection(precision="float16"), 17),
}


def tiny_vit(spec: ModelSpec) -> torch.nn.Module:
    """The zoo's Vision Transformer with one layer: those of ViT-Tiny take ten times as long."""
    return zoo._vit(spec, patch=8, width=32, depth=1, heads=2)


def environment(cache: Path) -> Path:
    """The Python of an environment with the old runtime, made once and kept in pytest's cache.

    Skips, with the reason, where the old runtime has no wheel or the package index cannot be reached.
    """
    if sys.version_info >= (3, 12):
        pytest.skip(f"onnxruntime {OLD} has wheels for Python 3.8 to 3.11 only")
    folder = cache / f"onnxruntime-{OLD}-python-{sys.version_info[0]}.{sys.version_info[1]}"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        venv.create(folder, clear=True)
        # --no-deps: sympy and others are there for tools that nobody calls.
        packages = (f"onnxruntime=={OLD}", "numpy<2")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", *packages]
        made = subprocess.run(pip, capture_output=True, text=True, timeout=300)
        if made.returncode:
            if unreachable(made.stderr):
                pytest.skip(f"no package index can be reached to install onnxruntime {OLD}")
            pytest.fail(made.stderr)
        done.touch()
    return python


def unreachable(said: str) -> bool:
    return any(
        words in said for words in ("Failed to establish a new connection", "ConnectTimeout", "Temporary failure")
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[str, Any]:
    """By case: the report, what the current ONNX Runtime gives, and what the old one gives."""
    folder = tmp_path_factory.mktemp("exports")
    python = environment(Path(pytestconfig.cache.mkdir("environments")))
    made: dict[str, Any] = {}
    for name, case in CASES.items():
        spec = ModelSpec(case.model, TEN, case.shape, (0.4,) * case.shape[0], (0.3,) * case.shape[0])
        torch.manual_seed(1)
        exported = export_model(zoo.build(spec), spec.name, spec.input_shape, "F32", len(spec.classes))
        weights = folder / f"{name}.safetensors"
        save(weights, {key: tensor.detach().numpy() for key, tensor in exported.tensors.items()})
        samples = random_samples(spec, exported.graph, 4)
        told: dict[str, Any] = {"job": "zoo", "round": 1, "weights_digest": "", "choices": case.choices}
        report = export(spec, exported.graph, weights, folder / f"{name}.onnx", samples=samples, **told)
        inputs = samples if case.choices.preprocessing else model_inputs(samples, spec)
        np.savez(folder / f"{name}.npz", inputs=inputs)
        session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
        made[name] = (report, session.run(None, {"images": inputs})[0])
    ran = subprocess.run(
        [python, "-I", RUNNER, folder], capture_output=True, text=True, timeout=300, env={"PATH": os.environ["PATH"]}
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == OLD
    return {name: (*each, np.load(folder / f"{name}.found.npy")) for name, each in made.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_old_runtime_gives_what_the_current_one_gives(results: dict[str, Any], name: str) -> None:
    report, now, then = results[name]
    assert (report.opset, report.ir_version) == (CASES[name].opset, {14: 7, 17: 8, 19: 9}[CASES[name].opset])
    assert then.dtype == np.float32
    limit = 1e-5 if report.precision == "float32" else 1e-2
    np.testing.assert_allclose(then, now, atol=limit * max(1, np.abs(now).max()))
    assert np.ptp(now, axis=1).min() > 0  # not all the same, which would say nothing


def test_an_index_that_cannot_be_reached_is_no_other_failure() -> None:
    refused = "NewConnectionError: Failed to establish a new connection: [Errno 111] Connection refused"
    assert unreachable(refused)
    assert not unreachable("ERROR: No matching distribution found for onnxruntime==0.0")
