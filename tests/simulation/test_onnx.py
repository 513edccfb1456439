"""The weights of a simulation as an ONNX file."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from fedepth.data.read import open_images
from fedepth.data.transforms import model_inputs
from fedepth.errors import ConfigError
from fedepth.job import load_config, model_spec
from fedepth.simulation.commands import simulate_command
from fedepth.simulation.onnx import export_weights
from fedepth.simulation.setup import Options
from tests.simulation.conftest import Lab


def test_the_exported_model_is_that_of_the_last_round(lab: Lab) -> None:
    job = lab.job()
    lines = lab.run(job)
    output = lab.folder / "digits.onnx"
    report = export_weights(Options(job=job, data="digits", output=lab.folder / "run"), lines[-1], output)
    assert (report.path, report.compared_on) == (str(output), "256 samples of the test data")
    assert report.top1_equal + report.ties == report.samples
    assert lines[-1].weights_digest.encode() in output.read_bytes()
    spec = model_spec(load_config(job))
    images = open_images("digits", spec, "test")
    session = onnxruntime.InferenceSession(output)
    (logits,) = session.run(
        None, {session.get_inputs()[0].name: model_inputs(images.read(np.arange(len(images))), spec)}
    )
    assert np.mean(logits.argmax(1) == images.labels) == lines[-1].accuracy


@pytest.mark.parametrize(
    ("name", "said"),
    [(".", "is a folder"), ("gone/m.onnx", "does not exist; make it"), ("labels.txt", "written beside the model")],
)
def test_a_place_that_cannot_be_written_is_told_before_the_simulation(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        simulate_command(tmp_path / "job.toml", tmp_path / "data", tmp_path / "run", onnx=tmp_path / name)
